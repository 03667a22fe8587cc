"""A run from its configuration to its report, whatever recipe it has."""

"""A finished run as a small HTTP service: what comes next in a city, behind the last frame of its store."""

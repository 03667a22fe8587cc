"""Everything that knows Ray; nothing below this floor imports it."""

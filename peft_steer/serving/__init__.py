"""Adapters in other engines: serving, exports to their formats, and imports from other tools' files."""

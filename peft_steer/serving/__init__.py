"""Adapters in other engines: exports to their formats, and imports from other tools' files."""

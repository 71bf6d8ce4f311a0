"""Which tokens are edited: the specification, such as `"f7+l7"`, and where each prompt ends."""

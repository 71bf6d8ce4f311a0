"""Which tokens are steered. Today: all of them.

`all` needs no mask; every other specification will resolve to a boolean mask per forward pass here.
"""

POSITIONS = ("all",)

"""Adapters of other tools as ours: control vectors (llama.cpp, repeng), files of tensors (hotwire, EasySteer,
steering-vectors), pyreft's folders. Nothing is ever unpickled; `peft-steer import` is the command.
"""

from .adapter import make_adapter
from .foreign import Foreign


__all__ = ["Foreign", "make_adapter"]

"""Trained adapters as files that other engines read: llama.cpp's control vector, LoRA, a merged model.

Each export is exact or refused; `peft-steer export` is the command.
"""

from .gguf_vector import export_gguf_vector
from .lora import export_lora
from .merged import export_merged


__all__ = ["export_gguf_vector", "export_lora", "export_merged"]

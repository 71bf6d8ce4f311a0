"""Whether the configuration in a file is the one that an adapter has."""

from collections.abc import Iterable
from typing import Any

from peft import PeftConfig


def check_same(config: PeftConfig, loaded: PeftConfig, names: Iterable[str], adapter_name: str, path: str) -> None:
    """Raise `ValueError` if the fields `names` differ between an adapter's configuration and one that was loaded.

    Args:
        config: The adapter's.
        loaded: The file's.
        names: The fields on which it depends what the weights do.
        adapter_name: Of the adapter.
        path: Of the file.
    """
    if loaded.peft_type != config.peft_type:
        differences = [f"`peft_type` is {config.peft_type} here and {loaded.peft_type} there"]
    else:
        differences = [
            f"`{name}` is {getattr(config, name)!r} here and {getattr(loaded, name)!r} there"
            for name in names
            if _plain(getattr(config, name)) != _plain(getattr(loaded, name))
        ]
    if differences:
        raise ValueError(
            f"The adapter {adapter_name!r} cannot take the weights of {path!r}, which has another configuration: "
            f"{'; '.join(differences)}. Delete it first (`delete_adapter({adapter_name!r})`), or load the file under "
            "another name."
        )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value

"""The only place that touches PEFT itself: new members of `PeftType`, their entries in PEFT's mappings, a check in
`PeftModel.load_adapter`, and the number that `print_trainable_parameters` prints."""

from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from peft_steer.interventions.base import idle_parameters, outlooks


def add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's `PeftType` enum (a `str` enum, which is closed by design) and return it.

    PEFT has no registration for methods outside its own source: `register_peft_method` refuses a name that the enum
    lacks. Calling this again with the same name returns the existing member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)  # enum's own attributes have no types
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(peft_type: PeftType, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make PEFT use `config_cls` and `model_cls` for `peft_type`; its parameter prefix is `model_cls.prefix`.

    Importing the package twice (a reload in a notebook) replaces the entries.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    # `register_peft_method` refuses a prefix that another method has; an extension of LoRA keeps LoRA's.
    shares_prefix = model_cls.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values()
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING and not shares_prefix:
        register_peft_method(
            name=peft_type.value.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix


def check_configurations_of_files() -> None:
    """Make `PeftModel.load_adapter` ask an adapter that exists under the given name whether the file's configuration
    is its own (`check_file`, if its configuration has that method).

    PEFT (0.21) loads such a file's weights and ignores its configuration: they would run with another scale,
    activation or positions, without a word.
    """
    load = getattr(PeftModel.load_adapter, "unchecked", PeftModel.load_adapter)

    @wraps(load)
    def checked(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        check = getattr(self.peft_config.get(adapter_name), "check_file", None)
        if check is not None:
            hub_kwargs, _ = self._split_kwargs(dict(kwargs))
            check(PeftConfig.from_pretrained(model_id, **hub_kwargs), adapter_name, str(model_id))
        return load(self, model_id, adapter_name, *args, **kwargs)

    checked.unchecked = load  # type: ignore[attr-defined]
    PeftModel.load_adapter = checked  # type: ignore[method-assign]


def count_what_acts() -> None:
    """Make `PeftModel.get_nb_trainable_parameters`, and so `print_trainable_parameters`, leave out what takes a
    gradient but has no effect; the latter also says what will remain of it later in the training.

    PEFT counts by `requires_grad`, which LoFiT cannot change between steps: an optimizer and DDP hold the parameters.
    """
    count = getattr(PeftModel.get_nb_trainable_parameters, "plain", PeftModel.get_nb_trainable_parameters)
    show = getattr(PeftModel.print_trainable_parameters, "plain", PeftModel.print_trainable_parameters)

    @wraps(count)
    def acting(self: PeftModel) -> tuple[int, int]:
        trainable, parameters = count(self)
        return trainable - idle_parameters(self), parameters

    @wraps(show)
    def printed(self: PeftModel) -> None:
        show(self)
        for line in outlooks(self):
            print(line)

    acting.plain, printed.plain = count, show  # type: ignore[attr-defined]
    PeftModel.get_nb_trainable_parameters = acting  # type: ignore[method-assign]
    PeftModel.print_trainable_parameters = printed  # type: ignore[method-assign]


check_configurations_of_files()
count_what_acts()

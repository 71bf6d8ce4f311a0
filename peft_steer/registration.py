"""The only place that touches PEFT's registry: new members of `PeftType` and their entries in PEFT's mappings."""

from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's `PeftType` enum (a `str` enum, which is closed by design) and return it.

    PEFT has no registration for methods outside its own source: `register_peft_method` refuses a name that the enum
    lacks. Calling this again with the same name returns the existing member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(peft_type: PeftType, config_cls: type, model_cls: type) -> None:
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

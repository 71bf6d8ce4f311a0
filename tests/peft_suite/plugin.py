"""A pytest plugin that runs PEFT's tests with other configurations than PEFT's own."""

from __future__ import annotations

import collections
import functools
import inspect
import os
import re
import shutil
from pathlib import Path

import datasets
import peft
import pytest

import blocks
import cases
import expected

CLASSES: pytest.StashKey[tuple[type, ...]] = pytest.StashKey()
CONFIG_ARGUMENTS = ("config_cls", "config_class", "config0", "config")
NEEDS_BLOCKS = ("steer", "joint")
_QUOTES = ["Be yourself; everyone else is already taken.", "So many books, so little time."] * 8


class _AllCached(collections.Counter):
    """PEFT's record of the models that it has fetched: all are in the local hub, so that none is looked up online."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", required=True, choices=["steer", "joint", "lora", "beft"])


def pytest_configure(config: pytest.Config) -> None:
    method = config.getoption("method")
    if method == "steer":
        classes = tuple({case.config_cls for case in cases.steer_cases()})
    elif method == "joint":
        from peft_steer import JointSteerLoraConfig

        peft.LoraConfig = JointSteerLoraConfig  # before PEFT's tests import the name
        classes = (JointSteerLoraConfig,)
    else:
        classes = (peft.BeftConfig,) if method == "beft" else (peft.LoraConfig,)
    config.stash[CLASSES] = classes
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = [f"tests/{name}.py" for name in cases.MODULES]
    peft.config.hf_hub_download = _into_any_cache(peft.config.hf_hub_download)


def _into_any_cache(download):
    """`hf_hub_download` with another `cache_dir`: the local hub's files go where a download would put them."""

    @functools.wraps(download)
    def wrapped(repo_id, *args, cache_dir=None, **kwargs):
        if cache_dir is not None:
            folder = f"models--{repo_id.replace('/', '--')}"
            shutil.copytree(Path(os.environ["HF_HUB_CACHE"], folder), Path(cache_dir, folder), dirs_exist_ok=True)
        return download(repo_id, *args, cache_dir=cache_dir, **kwargs)

    return wrapped


def pytest_collectstart(collector: pytest.Collector) -> None:
    if not isinstance(collector, pytest.Module):
        return
    from tests import testing_common, testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _AllCached()
    _replace(collector.obj, "load_dataset_english_quotes", _quotes)
    if collector.config.getoption("method") == "steer":
        # PEFT lists the methods that can adapt GPT2's Conv1D; a block's output is none.
        _replace(testing_common, "_skip_if_conv1d_not_supported", lambda *_: None)
        # Meant for BEFT alone, they change every method's `target_modules`: they ask `isinstance` of a class.
        _replace(collector.obj, "check_beft_config", lambda *_: None)
        _replace(collector.obj, "beft_tests", lambda *_: None)
        _replace(collector.obj, "deberta_beft_tests", lambda *_: None)
    if collector.config.getoption("method") in NEEDS_BLOCKS and hasattr(collector.obj, "MockTransformerWrapper"):
        wrapper = collector.obj.MockTransformerWrapper
        wrapper.from_pretrained = staticmethod(blocks.stand_in(wrapper.from_pretrained))
        collector.obj.DeepMLP = blocks.with_hidden_size(collector.obj.DeepMLP)
        collector.obj.MLP = blocks.BlockModel


def _replace(module, name: str, value) -> None:
    if hasattr(module, name):
        setattr(module, name, value)


def _quotes() -> datasets.DatasetDict:
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": _QUOTES}))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace (steer) or filter (the others) the parametrization over configurations."""
    method, classes = metafunc.config.getoption("method"), metafunc.config.stash[CLASSES]
    module, markers = metafunc.module.__name__.rpartition(".")[2], metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if marker.name != "parametrize":
            continue
        argnames, parameters, *rest = marker.args
        names = [name.strip() for name in argnames.split(",")] if isinstance(argnames, str) else list(argnames)
        kwargs = marker.kwargs
        if method == "steer":
            ours = cases.steer_parameters(module, metafunc.function.__name__, names)
            if ours is None:
                continue
            if not ours and metafunc.function.__name__ not in expected.LEFT_OUT:
                raise pytest.UsageError(f"{metafunc.function.__name__} is neither run nor named in expected.LEFT_OUT.")
            parameters = [pytest.param(*values, id=name) for name, values in ours]
            kwargs = {key: value for key, value in kwargs.items() if key != "ids"}
        elif set(CONFIG_ARGUMENTS) & set(names):
            parameters = [p for p in parameters if any(value in classes for value in _values(p))]
            if method == "joint" and names[:2] == ["test_name", "model_id"]:  # PEFT's other models have no blocks
                parameters = [p for p in parameters if _values(p)[1] == blocks.MODEL_ID]
        markers[index] = pytest.Mark(marker.name, (argnames, parameters, *rest), kwargs, _ispytest=True)


def _values(parameter: object) -> tuple:
    values = getattr(parameter, "values", parameter)
    return values if isinstance(values, tuple) else (values,)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our configurations, and attach what is expected of them."""
    method = config.getoption("method")
    kept, dropped = [], []
    for item in items:
        (kept if _is_ours(item) else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
    for item in items:
        test, case, where = item.originalname, _case(item), item.nodeid
        item.user_properties.append(("case", case))
        for expectation in expected.NOT_APPLICABLE[method]:
            if expectation.matches(test, case, where):
                item.add_marker(pytest.mark.skip(reason=f"not applicable: {expectation.reason}"))
        for expectation in expected.REFUSED[method]:
            if expectation.matches(test, case, where):
                raises = pytest.RaisesExc(check=functools.partial(_refusal, expectation.message))
                item.add_marker(pytest.mark.xfail(reason=f"refused: {expectation.reason}", raises=raises, strict=True))


def _refusal(message: str, error: BaseException | None) -> bool:
    """Whether `error` is our refusal, or what pytest made of it inside `pytest.raises` or `pytest.warns`."""
    while error is not None:
        if isinstance(error, ValueError) and re.search(message, str(error)):
            return True
        error = error.__context__
    return False


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _config_class(item: pytest.Item) -> type | None:
    parameters = _parameters(item)
    config = next((parameters[name] for name in CONFIG_ARGUMENTS if name in parameters), None)
    if isinstance(config, cases.OnBlocks):
        return config.case.config_cls
    return config if config is None or isinstance(config, type) else type(config)


def _is_ours(item: pytest.Item) -> bool:
    classes = item.config.stash[CLASSES]
    config_class = _config_class(item)
    if config_class is not None:
        return config_class in classes
    if item.config.getoption("method") == "steer":
        return item.originalname in cases.STEER_TESTS
    names = {cls.__name__ for cls in classes} | {"LoraConfig"}
    functions = [item.function, *(d.func for ds in item._fixtureinfo.name2fixturedefs.values() for d in ds)]
    return any(names & set(inspect.unwrap(f).__code__.co_names) for f in functions if inspect.isfunction(f))


def _case(item: pytest.Item) -> str:
    config_class = _config_class(item)
    if config_class is None:
        return "-"
    if item.config.getoption("method") == "steer":
        return next(case.name for case in cases.steer_cases() if case.name in item.callspec.id)
    kwargs = _parameters(item).get("config_kwargs", {})
    return "-".join([config_class.__name__, *sorted(kwargs.keys() - cases.COMMON_ARGUMENTS)])


@pytest.fixture(autouse=True)
def _stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("method") != "steer":
        return
    from tests import testing_common

    if "mixed_adapter_batches" in request.node.originalname and "config_cls" in _parameters(request.node):
        # PEFT skips these tests for all classes but its own: let ours pass for one of them here.
        for module in (request.module, testing_common):
            monkeypatch.setattr(module, "LoraConfig", _parameters(request.node)["config_cls"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how each test function went for each configuration."""
    table: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            case = dict(getattr(report, "user_properties", [])).get("case")
            if case is None or (outcome == "passed" and report.when != "call"):
                continue
            test = re.sub(r"\[.*", "", report.nodeid.rpartition("tests/")[2])
            table[test, case][outcome] += 1
    terminalreporter.section("PEFT's tests by configuration (xfailed: a merge refused by design)")
    for (test, case), counts in sorted(table.items()):
        terminalreporter.line(f"{test:90s} {case:24s} " + "  ".join(f"{n} {o}" for o, n in sorted(counts.items())))

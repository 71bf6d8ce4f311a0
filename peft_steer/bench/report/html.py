"""The report as one HTML file: tables that sort, figures that zoom, and all that they need inside."""

import dataclasses
import json
from importlib.resources import files

import pandas as pd
import yaml
from jinja2 import Environment
from plotly.offline import get_plotlyjs

from ..grid.plan import Grid
from .figures import figures
from .frame import Setting
from .markdown import TEXT_COLUMNS, beside, environments, failures, notes
from .table import main_table, sweep_table


def page(grid: Grid, settings: list[Setting], frame: pd.DataFrame, remarks: list[str]) -> str:
    """The page. Names in it are escaped: they come from the grid."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("peft_steer.bench.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    sections = [
        {
            "title": setting.title,
            "notes": notes(setting),
            "table": main_table(setting),
            "sweep": _plain(sweep_table(setting)) if setting.split == "test" and len(setting.sweep) else None,
            "beside": list(beside(setting, grid.reference)),
            "figures": {title: _html(figure) for title, figure in figures(setting).items()},
        }
        for setting in settings
    ]
    return template.render(
        plotly=get_plotlyjs(),
        sections=sections,
        text_columns=TEXT_COLUMNS,
        failures=failures(frame),
        remarks=remarks,
        environments=environments(frame),
        n_cells=len(frame),
        grid=yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(grid))), sort_keys=False, allow_unicode=True),
    )


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    return table.map(lambda text: text.replace("**", "★ ", 1).replace("**", ""))


def _html(figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False})

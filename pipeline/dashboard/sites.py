"""One site over several tables, such as those of every layer or of several runs.

Each has its data in a folder of its own, and the page that is looked at loads no other. The address says which it is:
``index.html?at=layer3#feature=89``. What follows the # is as in a site over one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.dashboards.values import rounded
from tailrace.pipeline.artifacts.folders import each_artifact
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.shared.pages import content_policy, policy_element
from tailrace.storage.errors import SettingsError
from tailrace.storage.formats import TABLES_KIND
from tailrace.storage.parsing import parse_json
from tailrace.storage.tables import read_table

SITE = Path(__file__).parent / "site"
"""The site's own page, styles and scripts."""
SITES = "data/sites.js"
"""The script that lists the tables of a site of several."""
_NO_NAME = re.compile(r"[^\w.=,+-]+")


def open_tables(paths: Sequence[Path]) -> dict[str, FeatureTables]:
    """Open tables, by their names in the address; those of a site of one have none. A folder stands for those in it.

    Raises SettingsError for tables of different models, and the errors of opening them.
    """
    paths = each_artifact(paths, TABLES_KIND)
    if len(paths) == 1:
        return {"": FeatureTables(paths[0])}
    names = [_NO_NAME.sub("-", path.name) for path in paths]
    if len(set(names)) < len(names):  # those of several runs may be called alike
        names = [_NO_NAME.sub("-", f"{path.absolute().parent.name}-{path.name}") for path in paths]
    problems = [
        f"{path}: is given twice, or has the name of another" for n, path in enumerate(paths) if names[n] in names[:n]
    ]
    opened = {name: FeatureTables(path) for name, path in zip(names, paths, strict=True)}
    first = next(iter(opened.values()))
    for one in opened.values():
        if differences := list_model_differences(first.manifest.model, one.manifest.model):
            problems.append(f"{one.path}: its model is another than that of {first.path}: {'; '.join(differences)}")
    if problems:
        raise SettingsError("\n".join(["one site cannot show all of these tables:", *problems]))
    return opened


_MATCHES = ("side", "feature", "cosine", "cosine_feature", "phi", "phi_feature")
"""Columns of `pipeline compare` that a site shows."""


def read_matches(paths: Sequence[Path], tables: Mapping[str, FeatureTables]) -> dict[str, dict[int, list[list[Any]]]]:
    """Return for tables of a site the most similar features of others, from files of `pipeline compare`.

    Raises SettingsError for a file that is none, or of tables that the site does not show.
    """
    found: dict[str, dict[int, list[list[Any]]]] = {}
    for path in paths:
        compared = read_table(path)
        try:
            summary = parse_json((compared.schema.metadata or {}).get(b"summary", b"null"))
            digests = [summary[side]["digest"] for side in ("a", "b")]
            compared = compared.select(_MATCHES)
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(
                f"--matches {path}: holds no matches; give a .parquet of `pipeline compare --out`"
            ) from error
        keys = [next((key for key, one in tables.items() if one.manifest.digest == of), None) for of in digests]
        if None in keys:
            raise SettingsError(
                f"--matches {path}: compares {summary['a'].get('tables')} and {summary['b'].get('tables')}, both of "
                "which a site must show; give it these tables too, or another file"
            )
        about = [tables[key].descriptions() for key in keys if key is not None]
        for row in compared.to_pylist():
            side = int(row["side"] == "b")
            own = found.setdefault(str(keys[side]), {}).setdefault(row["feature"], [])
            for measure in ("cosine", "phi"):
                if (other := row[f"{measure}_feature"]) is not None:
                    text = about[1 - side].get(other, "")
                    own.append([keys[1 - side], measure, other, rounded(row[measure]), text])
    return found


def index_page(tables: Mapping[str, FeatureTables]) -> bytes:
    """Return the site's page; if tables have names, it loads the list of them too."""
    page = (SITE / "index.html").read_text(encoding="utf-8")
    policy = policy_element(content_policy(has_files=True))
    listed = f'<script defer src="{SITES}"></script>\n' if len(tables) > 1 else ""
    return page.replace("<!--POLICY-->", policy).replace("</head>", f"{listed}</head>").encode()


def sites_file(tables: Mapping[str, FeatureTables]) -> bytes:
    """Return the script that says which tables there are, in their order."""
    listed = [
        {
            "at": key,
            "site": one.manifest.site.name,
            "features": one.n_features,
            **{name: rounded(one.layer.get(name)) for name in ("l0_mean", "fvu")},
        }
        for key, one in tables.items()
    ]
    return f"window.dashboardSites = {json.dumps(listed, allow_nan=False)};\n".encode()

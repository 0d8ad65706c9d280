"""The house's rules, read off the source: floors, faces, who may know Flower, and that every name leads somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fedvfm import registry
from fedvfm.simulation import experiment as experiments

ROOT = Path(__file__).parents[2]

# Floor by floor, from the cellar up: a module imports from its own floor and below.
FLOORS = [
    ["errors", "seeding"],
    ["registry", "report", "storage"],
    ["config", "runtime", "state"],
    ["aggregators", "backbones", "data", "flower", "protocol", "secure_aggregation", "tracking", "trust"],
    ["adapters", "audit", "doctor", "privacy", "tasks", "templates"],
    ["ledger", "model", "survey"],
    ["inference", "server"],
    ["client"],
    ["simulation"],
    ["", "cli"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
KNOWS_FLOWER = {
    "fedvfm.protocol.protocol",
    "fedvfm.protocol.secure_messages",
    "fedvfm.client.app",
    "fedvfm.client.batch.job",
    "fedvfm.client.batch.jobs",
    "fedvfm.client.process.executor",
    "fedvfm.client.gate.gate",
    "fedvfm.client.dry_run",
    "fedvfm.client.gate.reply_cache",
    "fedvfm.client.gate.enforcement",
    "fedvfm.client.gate.secure_answers",
    "fedvfm.client.gate.exchange",
    "fedvfm.client.gate.steps",
    "fedvfm.protocol.envelope",
    "fedvfm.server.app",
    "fedvfm.server.rounds.messaging",
    "fedvfm.server.coordinator.coordinator",
    "fedvfm.server.grid.liveness",
    "fedvfm.server.coordinator.admission_handshakes",
    "fedvfm.server.coordinator.survey_questions",
    "fedvfm.server.grid.roster",
    "fedvfm.server.grid.retrying",
    "fedvfm.server.rounds.federation",
    "fedvfm.server.rounds.secure_round",
    "fedvfm.flower.internals",
    "fedvfm.flower.guards",
    "fedvfm.flower.node",
    "fedvfm.flower.runtime",
    "fedvfm.flower.superlink",
    "fedvfm.flower.supernode",
    "fedvfm.simulation.engines.attacked_grid",
    "fedvfm.simulation.engines.deployment",
    "fedvfm.simulation.engines.flower_run",
    "fedvfm.simulation.engines.in_process",
    "fedvfm.simulation.engines.observed",
    "fedvfm.simulation.personal",
    "fedvfm.simulation.plan",
    "fedvfm.simulation.engines.ray",
    "fedvfm.simulation.repeats",
    "fedvfm.simulation.engines.workers",
}
PUBLIC_FLOWER = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
HEAVY = ("torch", "flwr", "transformers", "peft", "monai", "ray")


@dataclass(frozen=True)
class Import:
    """One import statement's target.

    Attributes:
        module: the imported module.
        name: the name taken out of it, empty where the module itself is imported.
        top: whether it runs when the module is imported.
        typing: whether only type checkers see it.
    """

    module: str
    name: str
    top: bool
    typing: bool


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "fedvfm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def is_face(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


@cache
def imports(name: str) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(MODULES[name].read_text()), top=True, typing=False))


def _walk(node: ast.AST, *, top: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, "", top, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide the floor"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield (
                    Import(full, "", top, typing)
                    if full in MODULES
                    else Import(str(child.module), alias.name, top, typing)
                )
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from _walk(child, top=top and not inside, typing=typing or guarded)


def ours(name: str, *, typing: bool = True) -> list[Import]:
    """Imports of our own modules."""
    return [one for one in imports(name) if one.module.partition(".")[0] == "fedvfm" and (typing or not one.typing)]


def room(module: str) -> str:
    """The part of the house a module is in: ``client``, ``config``, ``""`` for the package itself."""
    return [*module.split("."), ""][1]


# --- floors -----------------------------------------------------------------------------------------------------------


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_arrow_up() -> None:
    """Lazy imports and those for type checkers count too; lazy tables (strings) are how low floors name high ones."""
    up = [
        f"{name} -> {target.module}"
        for name in MODULES
        for target in ours(name)
        if FLOOR[room(target.module)] > FLOOR[room(name)]
    ]
    assert not up, f"imports from a higher floor: {up}"


def test_wings_do_not_know_each_other() -> None:
    """Client and server meet in ``protocol``; what predicts with an adapter needs none of the two."""
    apart = {"client": {"server"}, "server": {"client", "inference"}, "inference": {"client", "server"}}
    for name in MODULES:
        for target in ours(name):
            assert room(target.module) not in apart.get(room(name), set()), f"{name} imports {target.module}"


def test_few_modules_stand_flat() -> None:
    flat = {path.stem for path in (ROOT / "fedvfm").glob("*.py")}
    assert flat == {"__init__", "errors", "registry", "seeding"}


def test_no_import_circle() -> None:
    """Counting lazy imports: a circle put off is a circle."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        state[name] = 1
        path.append(name)
        for one in ours(name, typing=False):
            target = one.module
            assert state.get(target) != 1 or target == name, " -> ".join([*path[path.index(target) :], target])
            if target in MODULES and target not in state:
                visit(target)
        path.pop()
        state[name] = 2

    for name in MODULES:
        if name not in state:
            visit(name)
    assert len(state) == len(MODULES)


# --- faces ------------------------------------------------------------------------------------------------------------


def test_modules_not_faces_are_imported() -> None:
    """A face closes circles; inside the package only modules are imported, and names are written with their module.

    The package's own face is only asked for its version, by the door.
    """
    wrong = [
        f"{name} imports {target.module} {target.name}".rstrip()
        for name in MODULES
        if name != "fedvfm" and not is_face(name)
        for target in ours(name)
        if target.name or (is_face(target.module) and (target.module, name) != ("fedvfm", "fedvfm.cli.main"))
    ]
    assert not wrong, f"import the module, not a name out of it and not a face: {wrong}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if is_face(name)))
def test_faces_have_a_complete_sorted_all(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    public = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and not target.id.startswith("_")
    }
    public |= {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    public |= {one.name for one in imports(name) if one.name and one.module.startswith("fedvfm.") and not one.typing}
    module = importlib.import_module(name)
    public |= set(getattr(module, "_LAZY", {})) | ({"__version__"} if hasattr(module, "__version__") else set())
    listed = getattr(module, "__all__", [])
    assert list(listed) == sorted(public)
    assert all(getattr(module, one) is not None for one in listed)


def test_an_unknown_name_of_the_face_is_an_attribute_error() -> None:
    import fedvfm

    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = fedvfm.simulat


# --- Flower -----------------------------------------------------------------------------------------------------------


def test_who_may_know_flower() -> None:
    found = {name for name in MODULES if any(one.module.partition(".")[0] == "flwr" for one in imports(name))}
    assert found == KNOWS_FLOWER


def test_only_the_room_flower_touches_internals() -> None:
    for name in {one for one in KNOWS_FLOWER if not one.startswith("fedvfm.flower.")}:
        inner = {one.module for one in imports(name) if one.module.startswith("flwr")} - PUBLIC_FLOWER
        assert not inner, f"{name} imports {sorted(inner)}; Flower moves its internals, only the room flower may"


def test_doors_are_three_plain_lines() -> None:
    """Flower looks for a plain assignment to ``app`` in the syntax tree."""
    for wing in ("server", "client"):
        tree = ast.parse((ROOT / wing / "app.py").read_text())
        statements = [node for node in tree.body if not isinstance(node, ast.Expr)]
        assert len(statements) == 2
        assert isinstance(statements[0], ast.ImportFrom)
        assert statements[0].module == "fedvfm.simulation.engines.flower_run"
        assert isinstance(statements[1], ast.Assign)
        assert isinstance(statements[1].targets[0], ast.Name)
        assert statements[1].targets[0].id == "app"
        assert (ROOT / wing / "__init__.py").is_file(), "else a foreign package of that name shadows the door"


# --- weight -----------------------------------------------------------------------------------------------------------


def _loaded(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_fedvfm_loads_nothing_heavy() -> None:
    everything = _loaded(
        "import fedvfm, fedvfm.cli.main, fedvfm.config.schema, fedvfm.state.state\n"
        "import fedvfm.simulation.experiment, fedvfm.registry"
    )
    assert not everything & set(HEAVY)


def test_a_child_that_decodes_files_loads_only_what_decodes() -> None:
    """It starts with every process that reads images, and what it holds is what a hostile file could reach."""
    everything = _loaded("import fedvfm.data.decoding.worker, fedvfm.data.formats")
    assert not everything & {"pydantic", "fedvfm.config.schema", *HEAVY}


# --- names ------------------------------------------------------------------------------------------------------------


def tables() -> dict[str, registry.Table]:
    """Every table of the package, by where it stands."""
    found = {}
    for name, path in MODULES.items():
        if "registry.Table(" in path.read_text():
            module = importlib.import_module(name)
            found |= {
                f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, registry.Table)
            }
    return found


def test_every_table_entry_resolves() -> None:
    found = tables()
    assert {table.noun for table in found.values()} >= {
        "adapter kind",
        "aggregation rule",
        "augmentation",
        "backbone",
        "baseline",
        "codec",
        "data source",
        "engine",
        "partitioner",
        "task",
    }
    assert len({table.noun for table in found.values()}) == len(found), (
        "two tables of one noun would share entry points"
    )
    for where, table in found.items():
        for name in table.names():
            assert callable(table.get(name)), f"{where}: {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "simulations" / "experiments").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_shipped_experiment_validates(path: Path) -> None:
    what = experiments.load(str(path))
    assert experiments.examine(what).device == "meta"
    assert what.name == path.stem
    assert what.title
    assert experiments.bundled()[path.stem].samefile(path)
    # What is stored in a run folder comes back the same.
    assert experiments.parse(what.model_dump(mode="json"), "again") == what


def test_there_are_shipped_experiments() -> None:
    assert {"brain-mri", "cells", "nuclei"} <= set(experiments.bundled())


def test_metadata_and_version_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    import fedvfm

    assert project["version"] == fedvfm.__version__
    assert project["scripts"] == {"fedvfm": "fedvfm.cli.main:main"}


def test_the_table_of_rooms_is_what_the_packages_say() -> None:
    spec = importlib.util.spec_from_file_location("make_rooms", ROOT / "docs" / "make_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text() == page.text(), "run: python docs/make_rooms.py"


def test_the_picture_of_a_report_is_there_and_small() -> None:
    """``python docs/make_picture.py`` makes it; README.md shows it and stays short."""
    readme = (ROOT / "README.md").read_text()
    picture = ROOT / "docs" / "images" / "report.webp"
    assert f"]({picture.relative_to(ROOT)})" in readme
    assert picture.stat().st_size <= 200_000
    assert len(readme.splitlines()) <= 80

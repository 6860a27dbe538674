"""The arrows of the README's picture, read off the imports: entry points -> rooms -> diffusion, nn."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import litdiffusion

PACKAGE = Path(litdiffusion.__file__).parent
ENTRY_POINTS = {"train", "sample", "evaluate", "report"}
CORE = {"diffusion": {"torch", "jaxtyping"}, "nn": {"torch", "jaxtyping", "einops"}}
LEAVES = {"errors", "system.files", "system.parent_death", "system.redaction"}
MAY_SUBCLASS_LIGHTNING = ("training.", "data.datamodule", "slurm.cluster")


def module_name(path: Path) -> str:
    """The dotted name below the package; empty for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> Iterator[str]:
    """Every absolute name that ``source`` imports, wherever in it: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(source: str) -> set[str]:
    """The modules of ours, below the package, that ``source`` imports."""
    found = set()
    for name in imports(source):
        head, _, rest = name.partition(".")
        if head == "litdiffusion":
            while rest not in SOURCES:  # the last part may be a class or a function
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


def others(source: str) -> set[str]:
    """The packages of others, beyond the standard library, that ``source`` imports."""
    heads = {name.partition(".")[0] for name in imports(source)}
    return heads - {"litdiffusion"} - set(sys.stdlib_module_names)


def room(module: str) -> str:
    return module.partition(".")[0]


IMPORTS = {module: ours(source) for module, source in SOURCES.items()}


def lightning_classes(source: str) -> set[str]:
    """The classes in ``source`` that have a base of Lightning's."""
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0]
        in ("lightning", "pytorch_lightning")
    }
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(base))
    }


def test_the_walk_sees_every_kind_of_import():
    source = """
import torch.nn as nn, os
from litdiffusion import train
def f():
    from litdiffusion.diffusion import DDPM
    import litdiffusion.runs.folder
if TYPE_CHECKING:
    from litdiffusion.nn.unet import UNet
"""
    assert ours(source) == {"train", "diffusion", "runs.folder", "nn.unet"}
    assert others(source) == {"torch"}
    classes = "import lightning.pytorch as pl\nclass A(pl.Callback): ...\nclass B(dict): ...\n"
    assert lightning_classes(classes + "from lightning import Trainer as T\nclass C(T): ...") == {"A", "C"}


def test_the_walk_finds_the_package():
    assert SOURCES.keys() >= ENTRY_POINTS | LEAVES
    assert set(CORE) <= {room(module) for module in SOURCES}
    assert "diffusion.denoiser" in IMPORTS["diffusion.samplers"]


@pytest.mark.parametrize("core", CORE)
def test_the_core_imports_nothing_of_ours_and_little_of_others(core):
    modules = [module for module in SOURCES if room(module) == core]
    assert len(modules) > 3
    for module in modules:
        assert {room(each) for each in IMPORTS[module]} <= {core}, module
        assert others(SOURCES[module]) <= CORE[core], module


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_nothing_of_ours(leaf):
    assert IMPORTS[leaf] == set()


def test_sampling_joins_the_mathematics_to_its_randomness_and_nothing_more():
    mathematics = {module for module in IMPORTS["sampling"] if room(module) == "diffusion"}
    assert IMPORTS["sampling"] - mathematics <= {"system.processes"}
    assert others(SOURCES["sampling"]) <= {"torch", "jaxtyping"}


def test_nothing_imports_an_entry_point():
    users = {module for module, used in IMPORTS.items() if used & ENTRY_POINTS}
    assert users == set()


def test_only_load_model_is_offered_at_the_top():
    assert IMPORTS[""] == {"inference"}


def test_rooms_form_no_cycle():
    graph: dict[str, set[str]] = {}
    for module, used in IMPORTS.items():
        if module:  # the package itself hands out load_model when it is asked for
            graph.setdefault(room(module), set()).update({room(each) for each in used} - {room(module), ""})
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    for entry in ENTRY_POINTS:
        assert order.index("diffusion") < order.index(entry)


def test_modules_form_no_cycle():
    """Lazy imports count: one that is needed to break a cycle is a cycle."""
    graph = {module: used - {module, ""} for module, used in IMPORTS.items() if module}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES) - 1


def test_only_training_subclasses_lightning():
    classes = {module: lightning_classes(source) for module, source in SOURCES.items()}
    assert classes["training.module"] == {"LitDiffusion"}
    assert classes["data.datamodule"] == {"ImageDataModule"}
    strangers = {module for module, found in classes.items() if found}
    assert {m for m in strangers if not m.startswith(MAY_SUBCLASS_LIGHTNING)} == set()


@pytest.mark.parametrize("core", CORE)
def test_importing_the_core_loads_no_framework(core):
    code = f"import litdiffusion.{core}, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert f"litdiffusion.{core}" in loaded
    mine = {name for name in loaded if name.startswith("litdiffusion.")}
    assert {room(name.removeprefix("litdiffusion.")) for name in mine} == {core}
    frameworks = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets", "wandb", "matplotlib"}
    assert loaded & frameworks == set()

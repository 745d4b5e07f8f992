"""Who may import whom. Core and nodes are loaded by ComfyUI under an arbitrary name; the rest starts from the root."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"selfforcing_core", "nodes", "train", "bench", "tests"}
RELATIVE_REACH = {"": {"nodes", "selfforcing_core"}, "nodes": {"nodes", "selfforcing_core"}}  # else the own room only
HOST = {"folder_paths", "server", "execution", "node_helpers", "latent_preview"}
TRAINING_ONLY = {"omegaconf", "lmdb"}
OPTIONAL_KERNELS = {"flash_attn", "flash_attn_interface", "xformers", "sageattention", "sageattn3"}


parsed = functools.cache(ast.parse)  # every rule looks at every source


def imported(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[int, int, str, bool]]:
    """(line, relative level, dotted name, whether inside a function) of every import below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.lineno, node.level, name, inside_function) for name in names)
        yield from imported(node, inside_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def violations(path: str, source: str) -> list[str]:
    """One line per broken rule in the file at `path` (relative to the root, with forward slashes)."""
    folders = path.split("/")[:-1]
    room = folders[0] if folders else ""
    broken = []
    for line, level, name, inside_function in imported(parsed(source)):
        if level:
            target = [*folders[: len(folders) + 1 - level], *name.split(".")]
            if level > len(folders) + 1 or target[0] not in RELATIVE_REACH.get(room, {room}):
                broken.append(f"{path}:{line} reaches {'.'.join(target)} relatively")
            continue
        top = name.split(".")[0]
        is_host = top.startswith("comfy") or top in HOST
        if top in ROOMS and room in ("", "nodes", "selfforcing_core"):
            broken.append(f"{path}:{line} must import {name} relatively, or not at all")
        if top == "nodes" and room in ("train", "bench"):
            broken.append(f"{path}:{line} imports {name}: only ComfyUI imports nodes")
        if is_host and room != "nodes" and not path.startswith("tests/comfyui/"):
            broken.append(f"{path}:{line} imports {name}: only nodes/ knows the host")
        if top in TRAINING_ONLY and room in ("", "nodes", "selfforcing_core"):
            broken.append(f"{path}:{line} imports {name}: training only")
        if top in OPTIONAL_KERNELS and not inside_function:
            broken.append(f"{path}:{line} imports {name} outside a function")
        if top == "torch" and path == "selfforcing_core/geometry.py":
            broken.append(f"{path}:{line} geometry is plain arithmetic, without torch")
    return broken


def sources() -> list[str]:
    files = [*ROOT.glob("*.py"), *(file for room in sorted(ROOMS) for file in (ROOT / room).rglob("*.py"))]
    return [file.relative_to(ROOT).as_posix() for file in files]


def test_import_rules_hold_in_every_file() -> None:
    assert len(sources()) > 5, "the search for sources found next to nothing"
    broken = [word for path in sources() for word in violations(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not broken, "\n".join(broken)


def arrows(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the files that each file imports, by paths; inside functions and for the type checker too."""

    def file_of(name: str) -> str | None:
        return next((path for path in (f"{name}.py", f"{name}/__init__.py") if path in files), None)

    actual: dict[str, set[str]] = {path: set() for path in files}
    for path, source in files.items():
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.Import):
                names = [alias.name.replace(".", "/") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                folders = path.split("/")[: -node.level] if node.level else []
                start = "/".join([*folders, *(node.module or "").split(".")]).strip("/")
                names = [start, *(f"{start}/{alias.name}" for alias in node.names)]
            else:
                continue
            actual[path].update(target for name in names if (target := file_of(name)) and target != path)
    return actual


def circle(files: Mapping[str, str]) -> list[str]:
    """Return the files of one circle of imports; none where there is none."""
    try:
        TopologicalSorter(arrows(files)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_goes_in_a_circle() -> None:
    files = {path: (ROOT / path).read_text(encoding="utf-8") for path in sources()}
    assert sum(map(len, arrows(files).values())) > 200, "the search for arrows found next to nothing"
    assert not circle(files)


def test_adapter_imports_no_node() -> None:
    """Every file of nodes/ itself declares nodes, or the list of them; the rest is the adapter."""
    files = {path: (ROOT / path).read_text(encoding="utf-8") for path in sources() if path.startswith("nodes/")}
    adapter = {path for path in files if path.startswith("nodes/adapter/")}
    assert adapter
    reached = {path: arrows(files)[path] - adapter - {"nodes/__init__.py"} for path in adapter}
    assert not {path: targets for path, targets in reached.items() if targets}
    assert all("io.ComfyNode" in files[path] or path == "nodes/__init__.py" for path in files.keys() - adapter)


SURROUNDINGS = ("weights", "codecs", "roofline", "generate")  # of the method, which is the core's root


def test_the_method_imports_nothing_that_surrounds_it() -> None:
    files = {
        path: (ROOT / path).read_text(encoding="utf-8") for path in sources() if path.startswith("selfforcing_core/")
    }
    method = {path for path in files if path.count("/") == 1 and not path.endswith("__main__.py")}
    assert len(method) > 15
    outward = {path: targets - method for path, targets in arrows(files).items() if path in method}
    assert not {path: targets for path, targets in outward.items() if targets}
    assert {path.split("/")[1] for path in files.keys() - method} == {*SURROUNDINGS, "__main__.py"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("from train import b", "from train.a import f"),
        ("def f():\n    from train.b import g", "from . import a"),
        ("import train.b", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f"),
    ],
)
def test_planted_circle_is_found(one: str, other: str) -> None:
    assert set(circle({"train/a.py": one, "train/b.py": other})) == {"train/a.py", "train/b.py"}
    assert not circle({"train/a.py": one, "train/b.py": "import torch"})


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("selfforcing_core/model.py", "import selfforcing_core.rope"),
        ("selfforcing_core/model.py", "from selfforcing_core.rope import table"),
        ("selfforcing_core/model.py", "from ..nodes import host"),
        ("selfforcing_core/model.py", "from .. import train"),
        ("selfforcing_core/model.py", "from ...elsewhere import x"),
        ("selfforcing_core/model.py", "import comfy.utils"),
        ("selfforcing_core/model.py", "from comfy_api.latest import io"),
        ("selfforcing_core/model.py", "def f():\n    import folder_paths"),
        ("selfforcing_core/model.py", "import omegaconf"),
        ("selfforcing_core/model.py", "try:\n    import lmdb\nexcept ImportError:\n    lmdb = None"),
        ("selfforcing_core/attention.py", "import flash_attn"),
        ("selfforcing_core/attention.py", "if True:\n    from xformers import ops"),
        ("selfforcing_core/attention.py", "class Kernel:\n    import sageattention"),
        ("selfforcing_core/geometry.py", "def f():\n    import torch"),
        ("nodes/stream_sampler.py", "from ..train import dmd"),
        ("nodes/stream_sampler.py", "import train.dmd"),
        ("nodes/stream_sampler.py", "from selfforcing_core import rollout"),
        ("nodes/stream_sampler.py", "from omegaconf import OmegaConf"),
        ("train/dmd.py", "from ..selfforcing_core import rollout"),
        ("train/tiny/dmd.py", "from ...selfforcing_core.rollout import rollout"),
        ("train/dmd.py", "from nodes.adapter import host"),
        ("bench/host.py", "import nodes"),
        ("train/dmd.py", "import comfy"),
        ("bench/rollout.py", "from .. import selfforcing_core"),
        ("tests/test_model.py", "from ..selfforcing_core import model"),
        ("tests/test_model.py", "import server"),
        ("__init__.py", "from .train import dmd"),
        ("__init__.py", "import selfforcing_core"),
    ],
)
def test_planted_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("selfforcing_core/model.py", "from .rope import table\nfrom . import attention"),
        ("selfforcing_core/attention.py", "def attend():\n    import flash_attn"),
        ("nodes/stream_sampler.py", "import comfy.utils\nfrom ..selfforcing_core.rollout import rollout"),
        ("train/tiny/dmd.py", "import lmdb\nfrom selfforcing_core.rollout import rollout\nfrom .world import sample"),
        ("__init__.py", "def comfy_entrypoint():\n    from .nodes import extension"),
    ],
)
def test_permitted_import_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize("path", sources())
def test_source_is_ascii(path: str) -> None:
    assert (ROOT / path).read_bytes().isascii(), "hosts print source and logs on cp1252 consoles"


STARTED = """
import sys
import train.check_data, train.diffusion, train.dmd, train.export, train.import_config, train.make_latents
import train.make_lmdb, train.ode, train.plan, train.sample, train.trajectories
print(*(name for name in ("torch._dynamo", "transformers", "diffusers") if name in sys.modules))
"""


def test_commands_of_training_start_without_the_compiler_and_the_text_encoder() -> None:
    """Each takes a second or more to import, which `--help` and a refusal need not wait for."""
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr[-2000:]


BARE = """
import importlib.abc, sys
import torch, torch._dynamo, einops, safetensors.torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(f"{name} is not on a bare machine")

ABSENT = set(sys.argv[1].split(","))
for name in [name for name in sys.modules if name.partition(".")[0] in ABSENT]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
import bench.endless, bench.feedforward, bench.kernels, bench.loading, bench.rollout, bench.roofline, bench.rotary
import selfforcing_core.codecs.taehv
from bench.kernels import NARROW
from bench.rollout import Case, time_chunks
assert len(time_chunks(selfforcing_core.model.CausalWan(NARROW), Case(NARROW, 2, 2, 6, 1, 0), 6, 0)) == 2
"""


def test_the_rollout_and_its_benchmarks_run_on_torch_safetensors_and_einops_alone() -> None:
    """So that they can be measured on a machine that has nothing else."""
    media = {"PIL", "av", "numpy"}
    text = {"ftfy", "regex", "sentencepiece", "tokenizers", "transformers"}
    absent = {*media, *text, "diffusers", "huggingface_hub", "lmdb", "omegaconf", "rich", "tqdm"}
    command = [sys.executable, "-c", BARE, ",".join(absent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

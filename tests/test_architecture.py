"""The rules of the house that a machine can check: who imports whom, sizes, and where names may occur."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(path for part in ("hvtrain", "launcher", "shards") for path in (ROOT / part).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60

# What a module may import at its top level, within hvtrain, by layer: own layer and those below. The longest
# prefix that matches a module decides its layer.
LAYERS = [
    ("hvtrain.errors", 0),
    ("hvtrain.registry", 0),
    ("hvtrain.rng", 0),
    ("hvtrain.registry", 0),
    ("hvtrain.progress", 0),
    ("hvtrain.stopping", 0),
    ("hvtrain.config", 1),
    ("hvtrain.flow", 2),
    ("hvtrain.weights", 2),
    ("hvtrain.models", 2),
    ("hvtrain.parallel.context", 2),
    ("hvtrain.parallel.cores", 2),
    ("hvtrain.parallel.collectives", 2),
    ("hvtrain.parallel", 4),
    ("hvtrain.adapters", 4),
    ("hvtrain.slices", 4),
    ("hvtrain.lorafiles", 4),
    ("hvtrain.generate", 5),
    ("hvtrain.elsewhere", 5),
    ("hvtrain.encode", 5),
    ("hvtrain.train", 6),
    ("hvtrain.merge", 6),
    ("hvtrain.fit", 6),
    ("hvtrain.runs", 6),
    ("hvtrain.tiny", 7),
    ("hvtrain", 0),
]


class Import(NamedTuple):
    path: Path
    line: int
    name: str
    top: bool  # runs when the module is imported

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.name}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(path, child.lineno, alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative imports hide who imports whom"
                module = str(child.module)
                for alias in child.names:
                    whole = f"{module}.{alias.name}"
                    yield Import(path, child.lineno, whole if is_module(whole) else module, top)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, top and not inside)

    yield from walk(tree(path), True)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(module: str) -> int:
    return next(n for prefix, n in sorted(LAYERS, key=lambda x: -len(x[0])) if below(module, prefix))


def everything() -> list[Import]:
    return [found for path in CODE for found in imports(path)]


def test_there_is_code_to_check() -> None:
    assert len(CODE) > 40 and len(everything()) > 200


def test_packages_import_one_way() -> None:
    """launcher -> hvtrain -> shards."""
    upward = {"hvtrain": ("launcher",), "shards": ("launcher", "hvtrain"), "launcher": ()}
    bad = [
        found
        for found in everything()
        for package in upward[found.path.relative_to(ROOT).parts[0]]
        if below(found.name, package)
    ]
    assert not bad, "\n".join(map(str, bad))


def test_layers_of_hvtrain() -> None:
    """Also where a function imports only when it is called: what runs later is known all the same."""
    bad = [
        found
        for found in everything()
        if below(found.name, "hvtrain") and below(module_name(found.path), "hvtrain")
        and layer(found.name) > layer(module_name(found.path))
    ]
    assert not bad, "\n".join(map(str, bad))


def test_models_do_not_know_each_other() -> None:
    bad = []
    for found in everything():
        here, there = module_name(found.path).split("."), found.name.split(".")
        models = [
            parts[2] for parts in (here, there) if parts[:2] == ["hvtrain", "models"] and len(parts) > 2
        ]
        folders = [name for name in models if (ROOT / "hvtrain" / "models" / name).is_dir()]
        if below(found.name, "hvtrain.models") and len(there) > 2 and there[2] in folders:
            inside = here[:3] == there[:3]
            bad += [] if inside else [found]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("deepspeed", ["hvtrain/train/zero.py"]),
        ("argparse", ["launcher/table.py", "launcher/commands/"]),
        ("diffusers", ["hvtrain/models/"]),
        ("transformers", ["hvtrain/models/", "hvtrain/tiny/"]),
    ],
)
def test_a_library_is_imported_in_its_home_only(package: str, homes: list[str]) -> None:
    bad = [
        found
        for found in everything()
        if below(found.name, package) and not found.path.relative_to(ROOT).as_posix().startswith(tuple(homes))
    ]
    assert not bad, "\n".join(map(str, bad))


def test_no_torch_in_the_launcher_and_config() -> None:
    light = (
        "launcher", "hvtrain.config", "hvtrain.config.load", "hvtrain.config.rules", "hvtrain.errors",
        "shards.order"
    )
    bad = [
        found
        for found in everything()
        if below(found.name, "torch") and any(below(module_name(found.path), name) for name in light)
    ]
    assert not bad, "\n".join(map(str, bad))


def test_the_environment_is_read_in_two_places() -> None:
    bad = []
    for path in CODE:
        where = path.relative_to(ROOT).as_posix()
        if where.startswith("launcher/") or where == "hvtrain/parallel/context.py":
            continue
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
            ):
                bad.append(f"{where}:{node.lineno}")
    assert not bad, bad


def test_names_of_architectures_stay_in_their_folders() -> None:
    name = re.compile("hunyuan|skyreels|(?<![a-z])wan(?![a-z])", re.IGNORECASE)
    bad = []
    for path in CODE:
        where = path.relative_to(ROOT)
        if where.parts[:2] == ("hvtrain", "models") and len(where.parts) > 3:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            # The one exception: what `model.name` is when a config does not say.
            if (
                name.search(line)
                and not (where.as_posix() == "hvtrain/config/model.py" and "name: str =" in line)
            ):
                bad.append(f"{where}:{number}: {line.strip()}")
    assert not bad, "\n".join(bad)


# --- facts of architectures ---------------------------------------------------------------------------------

# Names of one model's tensors, fields and parts, and numbers that are its own.
FACTS = re.compile(
    r"(?<![a-z])(pooled|clip_l|clipl|t5|umt5|llm|llama|llava|byt5|qwen|siglip|heads_num|num_heads|hidden_size"
    r"|image_latents|token_replace|double_blocks|single_blocks)(?![a-z])|\b4n\b|\b16n\b|8n \+ 1",
    re.IGNORECASE,
)  # fmt: skip
# Where such a word is left, with how often. An entry that is more than there is fails too: the list shrinks.
FACTS_LEFT: dict[str, int] = {
    "hvtrain/encode/dataset.py": 2,  # keys of another program's dataset files
    "hvtrain/flow/timesteps.py": 9,  # names of distributions that a model gave its name, for any model
    "hvtrain/config/train.py": 2,  # the same
    "hvtrain/models/language.py": 1,  # a word of transformers
}


def test_facts_of_architectures_stay_in_their_folders() -> None:
    """Names are not enough: what a generic file assumes of a model is a fact of that model."""
    found: dict[str, list[str]] = {}
    for path in CODE:
        where = path.relative_to(ROOT)
        if (
            not (where.parts[:2] == ("hvtrain", "models") and len(where.parts) > 3)
            and where.parts[:2] != ("hvtrain", "tiny")
        ):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if FACTS.search(line):
                    found.setdefault(where.as_posix(), []).append(f"{where}:{number}: {line.strip()}")
    wrong = {name: lines for name, lines in found.items() if len(lines) > FACTS_LEFT.get(name, 0)}
    assert not wrong, "\n".join(line for lines in wrong.values() for line in lines)
    assert {name: len(lines) for name, lines in found.items()} == FACTS_LEFT, "mended: take it off FACTS_LEFT"


# --- records and arguments ----------------------------------------------------------------------------------

WHOLE = ("TrainConfig", "EncodeConfig", "GenerateConfig", "MergeConfig")
# Functions that still take a command's whole config below its run.py.
WHOLE_LEFT: set[str] = set()


def takes_whole_config(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            notes = [
                ast.unparse(arg.annotation)
                for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.annotation
            ]
        elif isinstance(node, ast.ClassDef):  # a record that holds one hands it on
            notes = [ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
        else:
            continue
        if any(re.search(rf"\b{name}\b", note) for name in WHOLE for note in notes):
            yield f"{path.relative_to(ROOT).as_posix()}:{node.name}"


def test_a_whole_config_stays_with_its_command() -> None:
    """Below a verb's run.py, and but for the rules, functions take sections or values: what they
    depend on is what they say."""
    found = set()
    for path in CODE:
        where = path.relative_to(ROOT).as_posix()
        if where.startswith("hvtrain/") and not where.startswith("hvtrain/config/") and path.name != "run.py":
            found.update(takes_whole_config(path))
    assert found == WHOLE_LEFT, "\n".join(sorted(found ^ WHOLE_LEFT))


def test_a_class_has_one_home() -> None:
    """Two records of one name are read as one. A name with an underscore before it is nobody else's, and an
    architecture's folder is a world of its own."""
    homes: dict[str, list[str]] = {}
    for path in CODE:
        models = below(module_name(path), "hvtrain.models")
        own = models and len(path.relative_to(ROOT / "hvtrain" / "models").parts) > 1
        for node in tree(path).body if not own else ():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    several = {name: where for name, where in homes.items() if len(where) > 1}
    assert not several, "\n".join(f"{name}: {', '.join(where)}" for name, where in several.items())


def test_files_and_functions_stay_small() -> None:
    bad = []
    for path in CODE:
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > MAX_FILE:
            bad.append(f"{path.relative_to(ROOT)}: {n} lines, at most {MAX_FILE}")
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n = (node.end_lineno or 0) - node.lineno + 1
                if n > MAX_FUNCTION:
                    bad.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {n} lines, at most "
                        f"{MAX_FUNCTION}"
                    )
    assert not bad, "\n".join(bad)


def test_no_folder_of_leftovers() -> None:
    assert not [path for path in CODE if path.stem in ("utils", "helpers", "common", "misc")]


def test_python_3_10_can_read_it() -> None:
    """The newest syntax and modules that may be used; CI itself may run a newer Python."""
    for path in CODE:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import) and any(alias.name == "tomllib" for alias in node.names):
                guarded = any(
                    isinstance(outer, (ast.If, ast.Try)) and node in ast.walk(outer)
                    for outer in ast.walk(tree(path))
                )
                assert guarded, f"{path}:{node.lineno}: tomllib is new in 3.11; fall back to tomli"

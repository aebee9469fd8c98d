"""The design's import directions, held by parsing every import, lazy ones too, and by loading the light modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("telemetry", "serving", "online_trainer", "router", "deploy")
# package → what it may import of ours, as module prefixes
ALLOWED = {
    "telemetry": ("telemetry",),
    "serving": ("serving", "telemetry"),
    "online_trainer": ("online_trainer", "telemetry"),
    "router": ("router", "telemetry", "serving.wire"),
    "deploy": PACKAGES,
}
HEAVY = ("torch", "ray", "transformers")
TORCH = ("torch", "transformers", "peft", "accelerate")
# the engine, LoRA and adapter modules of serving
TORCH_IN_SERVING = {
    "adapters", "decode_kernels", "decode_ops", "fused", "graphs", "kv", "lora", "lora_kernels", "peft_folder",
    "product", "prompts", "remote_engine", "runner", "sampling", "scoring", "shaping", "slots", "transformers_engine",
}  # fmt: skip
CORES = {  # what must run alone, on a GPU machine with nothing else installed
    "online_trainer": {"objective", "policy", "batches", "segments", "checkpoint", "evaluate", "config"},
    "serving": TORCH_IN_SERVING | {"engine", "scheduler", "text_stream", "safety", "wire"},
}
BACKENDS = ("ray", "kafka", "redis", "mlflow")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at the top, in functions and by importlib, but not for types only."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(_without_type_checking(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            yield name


class _WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            return node.orelse
        return self.generic_visit(node)


def _without_type_checking(tree: ast.Module) -> ast.AST:
    return _WithoutTypeChecking().visit(tree)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".")[: -node.level]
    return ".".join([*package, *filter(None, [node.module])])


def _imported_by_call(node: ast.Call) -> str:
    """The module in ``importlib.import_module("…")`` or ``__import__("…")``, else ""."""
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in ("import_module", "__import__") or not node.args or not isinstance(node.args[0], ast.Constant):
        return ""
    return str(node.args[0].value)


def is_in(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_place_in_the_circle_allows(package: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if is_in(name, (*PACKAGES, "tests")) and not is_in(name, ALLOWED[package])
        if not (name == "serving" and package == "router")  # the `from serving` of `from serving import wire`
    }
    assert not wrong


def test_every_package_is_there_to_be_looked_at() -> None:
    assert all(len(sources(package)) > 3 for package in PACKAGES)


def test_torch_lives_only_in_engine_lora_adapters_and_the_trainer() -> None:
    allowed = {ROOT / "serving" / f"{name}.py" for name in TORCH_IN_SERVING} | {ROOT / "deploy" / "models.py"}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for package in ("telemetry", "serving", "router", "deploy")
        for path in sources(package)
        if path not in allowed
        for name in imports(path)
        if is_in(name, TORCH)
    }
    assert not wrong


def test_ray_is_imported_only_by_serving() -> None:
    wrong = {
        str(path.relative_to(ROOT))
        for package in ("telemetry", "router", "online_trainer", "deploy")
        for path in sources(package)
        for name in imports(path)
        if is_in(name, ("ray",))
    }
    assert not wrong


@pytest.mark.parametrize("package", CORES)
def test_a_core_imports_no_backend(package: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        if path.stem in CORES[package]
        for name in imports(path)
        if is_in(name, (*BACKENDS, "telemetry.config", "telemetry.kafka_log", "telemetry.redis_log"))
    }
    assert not wrong


@pytest.mark.parametrize(
    "module",
    [
        "router.app",
        "serving.wire",
        "serving.config",
        "serving.engine",
        "online_trainer.config",
        "telemetry.events",
        "telemetry.event_log",
        "telemetry.routing",
        "telemetry.manifest",
        "telemetry.recorder",
        "deploy.cli",
        "deploy.launch",
        "deploy.release.config",
        "deploy.release.controller",
    ],
)
def test_importing_it_loads_neither_torch_nor_ray(module: str) -> None:
    script = f"import sys, {module}; print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_nobody_names_a_registry_or_a_machine_path() -> None:
    """A lock or source that names a host or a home folder works on one machine only."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in [ROOT / "requirements.lock", ROOT / "pyproject.toml", ROOT / "Makefile"]
        + [path for package in PACKAGES for path in sources(package)]
        if any(word in path.read_text() for word in ("--index-url", "--find-links", "/root/", "/work/", "/tmp/lab"))
    ]
    assert not wrong

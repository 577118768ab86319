"""What may import what: the rules that keep the front ends apart, and the registration of layers in either order."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import kquant

PROJECT = pathlib.Path(__file__).resolve().parent.parent
FRAMEWORKS = ("tensorflow", "keras", "tf_keras", "torch", "ai_edge_litert", "tensorflow_model_optimization")
# Not by find_spec: the folder tests/torch is on the path, and is a namespace of that name where torch is not installed.
needs_torch = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="torch")), reason="torch is not installed"
)
needs_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed")


def run(code, *folders):
    """Run code in a new interpreter that sees these folders first; gives what it printed, warnings included."""
    head = f"import sys; sys.path[:0] = {[str(f) for f in folders]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)], capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_importing_kquant_imports_no_framework():
    out, _ = run(f"import kquant; print([m for m in {FRAMEWORKS!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_kquant_and_core_import_where_no_framework_can_be():
    run(f"""
        import pkgutil

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {FRAMEWORKS!r}:
                    raise ImportError("blocked: " + name)

        sys.meta_path.insert(0, Blocker())
        import kquant, kquant.core
        for module in pkgutil.walk_packages(kquant.core.__path__, "kquant.core."):
            __import__(module.name)
        kquant.KQuantError, kquant.__version__
    """)


def core_files():
    return sorted((PROJECT / "kquant" / "core").rglob("*.py"))


@pytest.mark.parametrize("path", core_files(), ids=lambda p: p.stem)
def test_core_imports_numpy_and_the_standard_library_only(path):
    allowed = {"numpy", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: an import that does not name its package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            ours = name.startswith("kquant.core.")
            assert ours or name.partition(".")[0] in allowed, f"{path.name}:{node.lineno}: core imports {name}"


def torch_files():
    return sorted((PROJECT / "kquant_torch").rglob("*.py"))


@pytest.mark.parametrize("path", torch_files(), ids=lambda p: p.stem)
def test_kquant_torch_imports_torch_and_the_core_only(path):
    allowed = {"numpy", "torch", "onnx", "onnxruntime", "kquant_torch", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            ours = name == "kquant.core" or name.startswith("kquant.core.")
            assert ours or name.partition(".")[0] in allowed, f"{path.name}:{node.lineno}: imports {name}"


@needs_torch
def test_kquant_torch_works_where_tensorflow_cannot_be_imported():
    out, _ = run("""
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("tensorflow", "keras", "tf_keras", "ai_edge_litert"):
                    raise ImportError("blocked: " + name)

        sys.meta_path.insert(0, Blocker())
        import torch, kquant_torch
        x = torch.randn(4, 6)
        model = kquant_torch.wrap(torch.nn.Sequential(torch.nn.Linear(6, 3)), example_inputs=x, calibration_data=x)
        model(x).sum().backward()
        print(model[0].weight.grad.shape, [m for m in sys.modules if m in ("tensorflow", "keras", "tf_keras")])
    """)
    assert out.strip() == "torch.Size([3, 6]) []"


def project_files():
    """The text files of the project: what lies in its folders, without what tools and runs leave there."""
    folders = ("kquant", "kquant_torch", "tests", "examples", "benchmarks", "docs", ".ci")
    kinds = {".py", ".md", ".ini", ".toml", ".cfg", ".yaml", ".yml", ".txt", ".json", ""}
    found = [p for p in PROJECT.iterdir() if p.is_file()]
    for folder in folders:
        found += [p for p in (PROJECT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return sorted(p for p in found if p.suffix in kinds and p.name != ".git")


def test_no_file_names_a_path_of_a_machine():
    machine_path = re.compile(r"(?<![\w.\-/:])/(?:home|root|opt|work|mnt|tmp|Users)/\w|[A-Z]:\\Users|\.\./shared")
    found = [
        f"{path.relative_to(PROJECT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not found, "\n".join(found)


def test_public_names_are_the_same_for_type_checkers_and_at_run_time():
    tree = ast.parse(pathlib.Path(kquant.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_checkers = {n.module: tuple(sorted(a.name for a in n.names)) for n in block.body}
    assert {module: tuple(sorted(names)) for module, names in kquant._PUBLIC.items()} == for_checkers


@needs_keras
def test_every_public_name_resolves():
    out, _ = run("import kquant; print([n for n in kquant.__all__ if getattr(kquant, n, None) is None])")
    assert out.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'kquant' has no attribute 'quantise_model'"):
        _ = kquant.quantise_model


@needs_keras
@pytest.mark.parametrize(
    "order", ["import kquant, keras", "import keras, kquant", "import kquant, kquant.keras3.layers"]
)
def test_layers_are_registered_in_either_import_order(order):
    out, _ = run(
        f"""
        {order}
        import keras
        print([n for n in keras.saving.get_custom_objects() if n.startswith("kquant")] != [])
        """
    )
    assert out.strip() == "True"


@pytest.fixture
def stand_in(tmp_path):
    """A folder with a `keras` that is one line long, so that the hook is tested where keras is not installed."""
    (tmp_path / "keras.py").write_text("__version__ = '0.stand-in'\n")
    return tmp_path


FAKE_LAYERS = """
    import importlib.machinery

    class Layers:
        def find_spec(self, name, path=None, target=None):
            if name in ("kquant.keras3", "kquant.keras3.layers"):
                return importlib.machinery.ModuleSpec(name, self, is_package=name == "kquant.keras3")
        def create_module(self, spec):
            return None
        def exec_module(self, module):
            if module.__name__ == "kquant.keras3.layers":
                {body}

    sys.meta_path.insert(0, Layers())
"""


@pytest.mark.parametrize(
    "order", ["import kquant, keras", "import keras, kquant", "import kquant; from keras import __version__"]
)
def test_the_hook_runs_once_when_keras_is_complete(stand_in, order):
    fake = textwrap.dedent(FAKE_LAYERS).format(body="print('layers for', sys.modules['keras'].__version__)")
    out, _ = run(f"{fake}\n{order}\nimport keras, kquant", stand_in)
    assert out.splitlines() == ["layers for 0.stand-in"]


@pytest.mark.parametrize("order", ["import kquant, keras", "import keras, kquant"])
def test_a_failing_hook_warns_and_does_not_break_keras(stand_in, order):
    fake = textwrap.dedent(FAKE_LAYERS).format(body="raise ValueError('no such thing')")
    out, err = run(f"{fake}\n{order}\nprint(keras.__version__)", stand_in)
    assert out.strip() == "0.stand-in"
    assert "RuntimeWarning: kquant could not register its layers with keras 0.stand-in" in err
    assert "ValueError: no such thing" in err

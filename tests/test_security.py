"""What no module of ours does, by reading all of them; and what CI makes of an audit."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("sparse_patch", "kernels", "eval", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]  # fmt: skip
# Modules whose reading runs what a file says, or that start a shell.
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pty",
}
CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "pandas.read_pickle", "pd.read_pickle", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader",
    "zipfile.extractall", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
METHODS = {"extractall", "from_pickle", "read_pickle"}
# Options by their value: what must never be switched on in our code.
OPTIONS = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "weights_only": True}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(text: str) -> list[str]:
    """What a source does that it must not, by line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{one.name}" for one in node.names)]
        bad = [name for name in names if name.split(".")[0] in MODULES or name in CALLS]
        pairs: list[tuple[object, ast.expr]] = []
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            bad += [name] if name in CALLS or name.split(".")[-1] in METHODS else []
            pairs = [(one.arg, one.value) for one in node.keywords]
            # Not said, Transformers asks on the terminal.
            silent = not {one.arg for one in node.keywords} & {"trust_remote_code", None}
            bad += [name] if silent and re.fullmatch(r"Auto\w+\.from_pretrained", name) else []
        elif isinstance(node, ast.Dict):
            keys = (key.value if isinstance(key, ast.Constant) else None for key in node.keys)
            pairs = list(zip(keys, node.values, strict=True))
        for key, value in pairs:
            if key in OPTIONS and not (
                isinstance(value, ast.Constant) and value.value is OPTIONS[str(key)]
            ):
                bad.append(f"{key}={ast.unparse(value)}")
        found += [f"line {getattr(node, 'lineno', 0)}: {one}" for one in bad]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_run_or_unpickled_and_no_code_of_a_repository_is_trusted(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "options = {'trust_remote_code': user}",
        "AutoTokenizer.from_pretrained('x')",
        "import yaml\nyaml.load('x')",
        "from yaml import unsafe_load",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "archive.extractall()",
    ],
)
def test_each_of_these_would_be_seen(text):
    assert faults(text)


def test_sources_are_there():
    assert len(SOURCES) > 100


@pytest.fixture(scope="module")
def audit():
    """.ci/audit.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNKNOWN = {"name": "a", "skip_reason": "Dependency not found on PyPI"}
GOOD = {"name": "b", "version": "1", "vulns": []}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("found", "code", "says"),
    [
        ([GOOD], 0, "1 packages audited, 0 unknown to the index, 0 flaws"),
        ([GOOD, UNKNOWN], 0, "1 packages audited, 1 unknown"),
        ([UNKNOWN], 0, "skipped: Dependency not found"),
        ([], 0, "skipped: nothing"),
        ([GOOD, UNKNOWN, BAD], 1, "c 2: PYSEC-1, fixed in 3"),
        ([BAD], 1, "1 flaws"),
    ],
)
def test_a_flaw_fails_and_an_index_without_advisories_is_no_verdict(audit, found, code, says):
    got, lines = audit.verdict(json.dumps({"dependencies": found}), "Found 1 known vulnerability")
    assert got == code
    assert says in "\n".join(lines)


def test_without_network_the_audit_is_skipped_with_the_reason(audit):
    errors = "Traceback ...\nrequests.exceptions.ConnectionError: Failed to resolve 'pypi.org'"
    assert audit.verdict("", errors) == (0, [f"skipped: {errors.splitlines()[1]}"])
    assert audit.verdict("", "") == (0, ["skipped: pip-audit printed nothing"])


def test_without_pip_audit_ci_fails(audit):
    assert audit.verdict("", "/bin/python: No module named pip_audit")[0] == 1


def test_an_audit_without_end_is_stopped(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "SECONDS", 0.2)
    monkeypatch.setattr(
        audit, "COMMAND", [audit.sys.executable, "-c", "import time; time.sleep(9)"]
    )
    assert audit.main() == 0
    assert "skipped: pip-audit had no answer after 0.2 s" in capsys.readouterr().out

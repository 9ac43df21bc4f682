"""Known vulnerabilities of what is installed here, by pip-audit: found ones fail.

Where nobody can be asked (no network, or an index without advisories, which pip-audit calls "no
known vulnerabilities found") it says so and passes: that is no verdict.
"""

import json
import subprocess
import sys

SECONDS = 60
COMMAND = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]


def main() -> int:
    """Run pip-audit; the exit code for CI."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"skipped: pip-audit had no answer after {SECONDS} s")
        return 0
    code, lines = verdict(done.stdout, done.stderr)
    print("\n".join(lines))
    return code


def verdict(out: str, errors: str) -> tuple[int, list[str]]:
    """Exit code and what to print, from what pip-audit printed."""
    try:
        found = json.loads(out)["dependencies"]
    except ValueError:  # it prints its JSON after everything was asked
        last = (errors.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        missing = "No module named pip_audit" in errors
        return int(missing), [last if missing else f"skipped: {last}"]
    bad = [
        f"{one['name']} {one['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no release'}"
        for one in found
        for flaw in one.get("vulns", ())
    ]
    unknown = [one["skip_reason"] for one in found if "skip_reason" in one]
    asked = len(found) - len(unknown)
    if not asked:
        return 0, [f"skipped: {unknown[0] if unknown else 'nothing is installed'}"]
    about = f"{asked} packages audited, {len(unknown)} unknown to the index, {len(bad)} flaws"
    return int(bool(bad)), [*bad, about]


if __name__ == "__main__":
    sys.exit(main())

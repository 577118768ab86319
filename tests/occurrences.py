"""What the property test saw, at the end of the run: in how many models each row, bit width and quantizer occurred."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.getreports("passed")  # also those that xdist's workers sent
    models = [dict(report.user_properties)["occurred"] for report in passed if _has_occurred(report)]
    if not models:
        return
    counts = Counter(tuple(what) for model in models for what in model)
    terminalreporter.section(f"{len(models)} random models passed; how many of them held each")
    for group in dict.fromkeys(group for group, _ in sorted(counts, key=str)):
        held = sorted((str(name), n) for (of, name), n in counts.items() if of == group)
        terminalreporter.write_line(f"{group}: " + ", ".join(f"{name} {n}" for name, n in held))


def _has_occurred(report):
    return any(name == "occurred" for name, _ in report.user_properties)

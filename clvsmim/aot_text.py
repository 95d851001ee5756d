"""The reports of `clvsmim aot` as text: a block for people, a row of a table."""

from typing import Any

from clvsmim.aot_report import UTILISATION

Report = dict[str, Any]
GiB = 2**30

COLUMNS = (
    *("recipe", "step", "topology", "devices", "mesh", "images per device"),
    *("GiB of HBM", "TFLOP (by hand / compiler)", "GB through HBM"),
    *("collectives: number, MB", "roofline, bound by", "images/s at that"),
    f"hours of the run: at that, at {UTILISATION:.0%} of the peak if that is longer",
    "compiled in",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row(report: Report) -> str:
    """A row of a Markdown table under `HEAD`."""
    times, least, speed = report.get("roofline"), "", ""
    if times:
        least = f"{1e3 * times['seconds']:.1f} ms, {times['binds']}{_once(report)}"
        speed = _number(times["images_per_second"])
    name = report["recipe"] + (f" {report['change']}" if report["change"] else "")
    cells = (
        name,
        report["what"].removesuffix(" step"),
        _where(report),
        str(report["devices"]),
        _mesh(report),
        f"{report['batch'] / report['devices']:g}",
        _memory(report),
        _flops(report),
        f"{report['bytes_moved']['hbm'] / 1e9:.1f}" if report["fits"] else "",
        _kinds(report),
        least,
        speed,
        _hours(report),
        f"{report['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def block(report: Report) -> str:
    """What one compilation found, in lines."""
    change = f" with {report['change']}" if report["change"] else ""
    count, fits = report["parameters"], report["fits"]
    lines = [
        f"{report['recipe']}, {report['what']}{change}, on {_where(report)}: "
        f"{report['devices']} devices on {report['chips']} chips of {report['device']}",
        _line("mesh", _mesh(report)),
        _line(
            "batch",
            f"{report['batch']}, {report['batch'] / report['devices']:g} per device",
        ),
        _line(
            "parameters",
            f"{count['encoder'] / 1e6:.1f} M in the encoder, "
            f"{count['all'] / 1e6:.1f} M in all",
        ),
        _line("memory", f"{_memory(report)} GiB per device"),
    ]
    held = ", ".join(f"{name} {_size(x)}" for name, x in report["held"].items())
    lines += [_line("  given", f"{held} (without padding)")]
    if not fits:
        return "\n".join([*lines, _line("compiled in", _seconds(report)), ""])
    made = max(report["needs"] - report["arguments"], 0)
    lines += [_line("  made", f"{_size(made)} at the peak, beyond what is given")]
    lines += [_line("  largest", "of all that the step makes, not all at one time:")]
    for value in report["largest"]:
        if value["bytes"] > report["needs"] / 100:
            name = value["origin"] or "without a name"
            what = f"{value['count']} x {value['shape']}, {name}"
            lines += [_line("", f"{_size(value['bytes'])} in {what}")]
    lines += [
        _line("operations", f"{_flops(report)} TFLOP per device"),
        _line("bytes moved", _moved(report)),
        _line("collectives", _kinds(report, " MB") or "none"),
    ]
    for one in report["collectives"]:
        size = f"{one['bytes'] / 1e6:.3g} MB"
        number = f"{one['count']} x" if one["count"] else "in these,"
        over = f" over {one['group']}" if one["kind"] != "send" else ""
        text = f"{one['kind']}{over}: {number} {one['origin']}, {size}"
        lines += [_line("", text)]
    lines += [_line("roofline", _bound(report))]
    if report["hours"]:
        about = f"{report['steps']:,} steps: {_hours(report)} hours; the latter at "
        about += f"{UTILISATION:.0%} of the peak, or the same if that is shorter"
        lines += [_line("whole run", about)]
    return "\n".join([*lines, _line("compiled in", _seconds(report)), ""])


def _line(name: str, text: str) -> str:
    return f"  {name:14}{text}"


def _where(report: Report) -> str:
    slices = report["slices"]
    name = report["topology"]
    return f"{slices} slices of {name}" if slices > 1 else name


def _mesh(report: Report) -> str:
    return ", ".join(f"{k} {n}" for k, n in report["mesh"].items())


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"


def _size(size: float) -> str:
    for unit, name in ((GiB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def _memory(report: Report) -> str:
    needs, there = report["needs"], report["hbm"]
    text = f"{_gib(needs)} of {_gib(there)}" if there else _gib(needs)
    if report["fits"]:
        return text
    return f"{text}: does not fit, {_gib(needs - there)} too much"


def _flops(report: Report) -> str:
    counts = report["flops"]
    hand = f"{counts['analytic'] / 1e12:.3g}" if counts["analytic"] else "?"
    if not counts.get("compiler"):
        return hand
    return f"{hand} / {counts['compiler'] / 1e12:.3g}{_once(report)}"


def _moved(report: Report) -> str:
    moved = report["bytes_moved"]
    return (
        f"about {moved['hbm'] / 1e9:.3g} GB through HBM, {moved['all'] / 1e9:.3g} GB "
        f"with those that stay on the chip{_once(report)}"
    )


def _once(report: Report) -> str:
    return " (loops count once)" if report["loops"] else ""


def _kinds(report: Report, unit: str = "") -> str:
    """Number and size of the collectives of each kind."""
    total: dict[str, list[float]] = {}
    for one in report.get("collectives", ()):
        row = total.setdefault(one["kind"], [0, 0])
        row[0] += one["count"]
        row[1] += one["bytes"] / 1e6
    return "; ".join(f"{k}: {n}, {size:.3g}{unit}" for k, (n, size) in total.items())


def _bound(report: Report) -> str:
    times = report["roofline"]
    if not times:
        return f"unknown: no data sheet of {report['device']} here"
    kinds = ("compute", "memory", "interconnect", "network")
    each = ", ".join(f"{k} {1e3 * times[k]:.2f} ms" for k in kinds if times[k])
    speed = _number(times["images_per_second"])
    return (
        f"{1e3 * times['seconds']:.2f} ms a step by data sheets: {times['binds']} "
        f"binds ({each}){_once(report)}; {speed} images/s at that"
    )


def _hours(report: Report) -> str:
    found = report.get("hours")
    return f"{found['roofline']:.2g}, {found['usual']:.2g}" if found else ""


def _number(x: float) -> str:
    return f"{x:,.0f}"


def _seconds(report: Report) -> str:
    return f"{report['compile_seconds']:.0f} s"

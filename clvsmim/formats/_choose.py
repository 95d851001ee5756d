"""Which family a file is of, and which of its tensors belong to one network."""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from clvsmim import plugin
from clvsmim.formats import _rules
from clvsmim.formats._family import PATH, Family, Look
from clvsmim.formats._report import Report, some

# Under opt/ big_vision keeps moments; vision_transformer keeps weights, opt/target/.
STATE = (
    r"(optimizer|opt_state|scaler|amp|loss_scaler|lr_scheduler|scheduler"
    r"|dino_loss|ibot_loss|koleo_loss)([/.].*)?|opt/(?!target/).*"
)
MOST = 1000  # names that are compared with every family's table, for a message


def choose(look: Look, format: str) -> tuple[str, Family, str]:
    """(module, family, how it was recognised).

    Raises:
      ValueError: no family, or several that would be different networks.
    """
    if format:
        family = plugin.find("formats", format)()
        return format, family, family.recognise(look) or "as you said"
    families = {n: plugin.find("formats", n)() for n in plugin.names("formats")}
    found = {n: f.recognise(look) for n, f in families.items()}
    found = {n: evidence for n, evidence in found.items() if evidence}
    if len(found) == 1:
        ((name, evidence),) = found.items()
        return name, families[name], evidence
    if found:
        which = "; ".join(f"{n} ({evidence})" for n, evidence in found.items())
        raise ValueError(
            f"the names fit several families, which differ in what they make of an "
            f"image: {which}; say which with format="
        )
    raise ValueError(nothing_fits(look, families))


def nothing_fits(look: Look, families: Mapping[str, Family]) -> str:
    """What was looked for, and the family whose table fits best."""

    tensors = dict(islice(look.tensors.items(), MOST))

    def fits(name: str) -> tuple[int, list[str]]:
        family = families[name]
        names, _ = select(tensors, family, "", Report(), strict=False)
        wrong = [full for n, full in names.items() if not known(n, family)]
        return len(tensors) - len(wrong), wrong

    scores = {name: fits(name) for name in families}
    best = max(scores, key=lambda name: scores[name][0])
    count, wrong = scores[best]
    looked = ", ".join(f"{name}: {f.looks_for}" for name, f in families.items())
    near = f"names look like {some(list(tensors))}"
    if count:
        near = (
            f"{best} is closest, {count} of {len(tensors)} names fit"
            + (f", not {some(wrong)}" if wrong else "")
            + f"; to try it: format={best}"
        )
    if look.timm and look.table == "none":
        near += "; pos_embed is not there, or not of three axes"
    return f"no known family; looked for {looked}; {near}"


def known(name: str, family: Family) -> bool:
    """Whether the table of a family has a line for a name."""
    rows = (*family.rules, *family.givens)
    return _rules.match(name, rows)[0] is not None or any(
        re.fullmatch(drop.theirs, name) for drop in family.drops
    )


def select(
    tensors: Mapping[str, Any],
    family: Family,
    branch: str,
    out: Report,
    strict: bool = True,
) -> tuple[dict[str, str], dict[str, str]]:
    """({name in the table: name in the file}, {other names: why they are left out}).

    Raises:
      ValueError: a branch that is not there, or weights that are stored twice.
    """
    there = [
        name
        for name, starts in family.branches.items()
        if any(re.match(start, full) for full in tensors for start, _ in starts)
    ]
    which = branch if branch in family.branches else (there or [""])[0]
    names: dict[str, str] = {}
    twice: dict[str, list[str]] = {}
    others: dict[str, str] = {}
    for full in tensors:
        if re.fullmatch(STATE, full):
            others[full] = "training state, not weights"
            continue
        name = shortened(full, family.branches.get(which, ()))
        other = [b for b in there if shortened(full, family.branches[b]) is not None]
        if name is None and other:
            others[full] = f"of the {other[0]} encoder; branch={other[0]} opens it"
            continue
        name = re.sub(f"^{PATH}", "", full) if name is None else name
        for expression, new in family.aliases:
            name = re.sub(expression, new, name)
        if name in names:
            twice.setdefault(name, [names[name]]).append(full)
        names.setdefault(name, full)
    if twice and strict:
        choose_twice(names, twice, others, branch, out)
    elif branch and branch not in there and strict:
        raise ValueError(
            f"branch={branch!r}; this file has {', '.join(there) or 'none'}"
        )
    if len(there) > 1 and which and strict:
        rest = ", ".join(b for b in there if b != which)
        out.what.append(f"the {which} encoder; there too: {rest} (branch={rest})")
    return names, others


def choose_twice(
    names: dict[str, str],
    twice: dict[str, list[str]],
    others: dict[str, str],
    branch: str,
    out: Report,
) -> None:
    """Of weights under several keys ("model/", "model_ema/") keep those of one."""
    keys = sorted(
        {full.rpartition("/")[0] for fulls in twice.values() for full in fulls}
    )
    want = branch or next((k for k in ("model", "state_dict") if k in keys), "")
    if want not in keys:
        raise ValueError(
            f"weights are there several times, under {some(keys)}; say branch="
        )
    rest = ", ".join(key for key in keys if key != want)
    out.assumed.append(f"the weights under {want!r}; others are under {rest} (branch=)")
    for name, fulls in twice.items():
        for full in fulls:
            if full.rpartition("/")[0] == want:
                names[name] = full
            else:
                others[full] = f"the weights under {want!r} are used"


def shortened(full: str, starts: tuple[tuple[str, str], ...]) -> str | None:
    """The name in the table, or None if it begins in no such way."""
    for start, new in starts:
        if re.match(start, full):
            return re.sub(f"^(?:{start})", new, full)
    return None

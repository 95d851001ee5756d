"""Who is there: processes that find each other before JAX may, and then exchange text.

`jax.distributed` ends a process with a C++ stack where another one does not come, and
names nobody. So process 0 listens at the coordinator's address first, the others call
it, and all learn who came. The connections stay, and carry one line of text a process
per `gather`; the port itself is free again for `jax.distributed`.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

HELLO = "clvsmim roll call"
SILENCE = 900.0  # seconds that one may keep the others waiting; compiling takes minutes


class Lost(ValueError):
    """A process has gone, says nothing, or is at another place than the others."""


class Roll:
    """All processes of a job, of which this is number `index`.

    Attributes:
      index: of this process, from 0.
      hosts: the host name of every process, in order.
    """

    def __init__(
        self,
        index: int,
        hosts: Sequence[str],
        links: Sequence["Link"] = (),
        silence: float = SILENCE,
    ):
        self.index, self.hosts = index, tuple(hosts)
        self._links, self._silence = tuple(links), silence

    def gather(self, what: str, text: str) -> list[str]:
        """The `text` of every process, in order; all must call it with one `what`.

        Raises:
          Lost: one of them does not.
        """
        if len(self.hosts) == 1:
            return [text]
        reply = self._report(what, text) if self.index else self._collect(what, text)
        if "wrong" in reply:
            raise Lost(reply["wrong"])
        return reply["texts"]

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _collect(self, what: str, text: str) -> dict[str, Any]:
        """What process 0 does: hear all, then tell all."""
        until = time.monotonic() + self._silence
        texts, wrong = [text], []
        for link, (i, host) in zip(
            self._links, list(enumerate(self.hosts))[1:], strict=True
        ):
            try:
                said = link.receive(until)
            except (OSError, ValueError) as error:
                wrong.append(f"process {i} ({host}) is lost in {what!r}: {error}")
                continue
            if said["what"] != what:
                wrong.append(
                    f"process {i} ({host}) is at {said['what']!r} and process 0 at "
                    f"{what!r}; they say: {said['text'][:300]}; {text[:300]}"
                )
            texts.append(said["text"])
        reply = {"wrong": "; ".join(wrong)} if wrong else {"texts": texts}
        for link in self._links:
            _tell(link, reply)
        return reply

    def _report(self, what: str, text: str) -> dict[str, Any]:
        """What every other process does: tell process 0, then hear it."""
        (link,) = self._links
        try:
            link.send({"what": what, "text": text})
            return link.receive(time.monotonic() + 1.2 * self._silence)
        except (OSError, ValueError) as error:
            return {
                "wrong": f"process 0 ({self.hosts[0]}) is lost in {what!r}: {error}"
            }


def alone() -> Roll:
    """The roll of a job of one process."""
    return Roll(0, (socket.gethostname(),))


def call(
    coordinator: str,
    processes: int,
    process: int,
    *,
    seconds: float,
    silence: float = SILENCE,
) -> Roll:
    """Wait until all `processes` are there.

    Args:
      coordinator: HOST:PORT, which process 0 listens at.
      process: the number of this one, from 0.
      seconds: how long to wait for the others.
      silence: how many seconds a process may keep the others waiting later.

    Raises:
      ValueError: who is missing and who came; two have one number; the port is taken.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process {process}: expected 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {coordinator!r}: expected HOST:PORT")
    until = time.monotonic() + seconds
    me = {"hello": HELLO, "process": process, "of": processes}
    me["host"] = socket.gethostname()
    if process:
        link, verdict = _join(host.strip("[]"), int(port), me, until, seconds)
        links = (link,)
    else:
        links, verdict = _welcome(int(port), me, until, seconds)
    if "wrong" in verdict:
        for link in links:
            link.close()
        raise ValueError(verdict["wrong"])
    return Roll(process, verdict["hosts"], links, silence)


class Link:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        self._socket, self._rest = connection, b""

    def send(self, content: dict[str, Any]) -> None:
        self._socket.settimeout(30.0)
        self._socket.sendall(json.dumps(content).encode() + b"\n")

    def receive(self, until: float) -> dict[str, Any]:
        """The next line; `until` is a time of the monotonic clock.

        Raises:
          OSError: nothing came in time, or the other side has gone.
          ValueError: it is no JSON: another program.
        """
        while b"\n" not in self._rest:
            self._socket.settimeout(max(0.01, until - time.monotonic()))
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError("it has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._socket.close()


def _welcome(
    port: int, me: dict[str, Any], until: float, seconds: float
) -> tuple[tuple[Link, ...], dict[str, Any]]:
    """What process 0 does: (links in order of processes, verdict for all)."""
    came, links, wrong = {0: me["host"]}, {}, ""
    with _listening(port) as server, contextlib.ExitStack() as unwanted:
        while len(came) < me["of"] and not wrong and time.monotonic() < until:
            link, said = _caller(server, until)
            if link is None:
                continue
            i, wrong = said["process"], _clash(said, came, me)
            if wrong:
                unwanted.callback(link.close)
                unwanted.callback(_tell, link, {"wrong": wrong})  # the first to happen
            else:
                came[i], links[i] = said["host"], link
    verdict = _verdict(came, me["of"], wrong, seconds)
    for link in links.values():
        _tell(link, verdict)
    return tuple(links[i] for i in sorted(links)), verdict


def _caller(
    server: socket.socket, until: float
) -> tuple[Link | None, dict[str, Any] | None]:
    """(link, what it said) of the next one that calls; (None, None) for a stranger, or
    when the time is over."""
    server.settimeout(max(0.01, until - time.monotonic()))
    try:
        link = Link(server.accept()[0])
    except OSError:
        return None, None
    try:
        said = link.receive(min(until, time.monotonic() + 5))
        if said["hello"] == HELLO:
            return link, said
    except (OSError, ValueError, KeyError, TypeError):  # it says something else
        pass
    link.close()
    return None, None


def _clash(said: dict[str, Any], came: dict[int, str], me: dict[str, Any]) -> str:
    """Why one that says this cannot be of the same job as those who came, or ""."""
    i, host = said["process"], said["host"]
    if said["of"] != me["of"]:
        return (
            f"process {i} ({host}) expects {said['of']} processes, process 0 "
            f"({me['host']}) {me['of']}; start all with the same number"
        )
    if i in came:
        return (
            f"two processes have the number {i}, on {came[i]} and {host}; give each "
            "its own"
        )
    return ""


def _tell(link: Link, verdict: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # lost meanwhile: the first gather says so
        link.send(verdict)


def _verdict(
    came: dict[int, str], count: int, wrong: str, seconds: float
) -> dict[str, Any]:
    missing = [i for i in range(count) if i not in came]
    if missing and not wrong:
        who = ", ".join(f"{i} ({came[i]})" for i in sorted(came))
        what = "processes" if len(missing) > 1 else "process"
        wrong = (
            f"{what} {', '.join(map(str, missing))} of {count} did not come in "
            f"{seconds:g} s; came: {who}. Start the missing, on the host of that "
            "number, or see whether its firewall lets it reach the coordinator"
        )
    if wrong:
        return {"wrong": wrong}
    return {"hosts": [came[i] for i in sorted(came)]}


def _join(
    host: str, port: int, me: dict[str, Any], until: float, seconds: float
) -> tuple[Link, dict[str, Any]]:
    """What every other process does: (link to process 0, its verdict)."""
    why: object = "no answer"
    while time.monotonic() < until:
        link = None
        try:
            link = Link(socket.create_connection((host, port), timeout=5))
            link.send(me)
            # Process 0 may have started later, and waits as long from then on.
            return link, link.receive(time.monotonic() + seconds + 10)
        except OSError as error:
            why = error.strerror or error
            time.sleep(0.1)
        except ValueError as error:  # it speaks, but not our language
            why = f"another program answers: {error}"
            until = 0.0
        if link:
            link.close()
    raise ValueError(
        f"process 0 does not answer at {host}:{port} for {seconds:g} s ({why}); start "
        "it there, and see that the address is its own and no firewall is between"
    )


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at port {port} ({error.strerror}); is another "
            "job running there? Choose another port for the coordinator"
        ) from error
    with server:
        yield server

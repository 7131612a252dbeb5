"""A page in a real headless Chromium, driven over its debugging pipe with the standard library.

The browser reads commands of the Chrome DevTools Protocol on its descriptor 3 and answers on 4:
JSON, each message closed by a zero byte.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    " --disable-background-networking --remote-debugging-pipe --window-size=1300,1000"
).split()
PATIENCE = 120  # seconds to wait for an answer; the machine may be busy


class Page:
    """A tab of its own browser. events: all that the browser has told of it."""

    def __init__(self, profile):
        commands, self.commands = _pipe()
        self.answers, answers = _pipe()

        def at_3_and_4():
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        self.process = subprocess.Popen(
            [PROGRAM, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=at_3_and_4,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.events, self.unread, self.n_calls, self.session = [], b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")
        session = self.call("Target.attachToTarget", **target, flatten=True)
        self.session = {"sessionId": session["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def load(self, path):
        """Opens a file, afresh if it is the one that is open."""
        n_events = len(self.events)
        self.call("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events[n_events:]):
            self._read()

    def call(self, method, **parameters):
        self.n_calls += 1
        message = {"id": self.n_calls, "method": method, "params": parameters} | self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.n_calls:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self):
        """The next message; an event is kept."""
        stop = time.monotonic() + PATIENCE
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.answers], [], [], max(0, stop - time.monotonic()))
            part = os.read(self.answers, 2**20) if ready else b""
            assert part, "the browser has ended, or does not answer"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(message)
        if "method" in message:
            self.events.append(message)
        return message

    def evaluate(self, expression):
        """The value of a JavaScript expression on the page, awaited if it is a promise."""
        told = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **told)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression):
        stop = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < stop, f"never true: {expression}"
            time.sleep(0.05)

    def mouse(self, selector, click=False):
        """Moves the mouse to the middle of an element, and clicks on it."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        place = "({x, y, width, height}) => ({x: x + width / 2, y: y + height / 2})"
        at = self.evaluate(f"({place})({element}.getClientRects()[0])")
        steps = ["mouseMoved"] + ["mousePressed", "mouseReleased"] * click
        for step in steps:
            button = {} if step == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=step, **at, **button)

    def key(self, name):
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[name]
        for step in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=step, key=name, code=name, windowsVirtualKeyCode=code
            )

    def errors(self):
        """What went wrong on the page: exceptions, messages in the console."""
        wrong = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        for event in self.events:
            level = event["params"].get("entry", {}).get("level") or event["params"].get("type")
            if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled"):
                wrong += [event] * (level in ("error", "warning", "assert"))
        return wrong

    def requested(self):
        """Addresses of all that the page has asked for."""
        asked = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in asked]

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


def _pipe():
    """Both ends, at descriptors that are not 3 and 4."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved

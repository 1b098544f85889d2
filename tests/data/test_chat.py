"""The chat client: cache, repairs, retries, budget, an endpoint on this machine."""

import contextlib
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jaxpapers.data import chat, replies

ASK = [{"role": "user", "content": "Two numbers, please."}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


class Script:
    """A provider that gives texts in order, and remembers what it was sent."""

    identity = {"model": "script"}

    def __init__(self, *texts):
        self.texts, self.sent = list(texts), []

    def __call__(self, messages, schema):
        self.sent.append(list(messages))
        return chat.Reply(self.texts.pop(0), 10, 5)


def positive(value):
    return [] if value.get("x", 0) > 0 else [f"x must be > 0, got {value.get('x')}"]


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"x": 1}', {"x": 1}),
        ('Sure:\n```json\n{"x": [1, 2]}\n```\nDone.', {"x": [1, 2]}),
        ('```\n{"a": 0}\n```\nBetter:\n```json\n{"a": 1}\n```', {"a": 1}),
        (r'{"x": "\(a\) \frac{1}{2} \\beta \times"}',
         {"x": r"\(a\) \frac{1}{2} \beta \times"}),
        (r'{"x": "\u0041\n\"q\""}', {"x": 'A\n"q"'}),
        # JSON as it stands, of form feeds and tabs.
        (r'{"a": "\frac{1}{2} \theta"}', {"a": r"\frac{1}{2} \theta"}),
        (r'{"a": "\nu \neq \\nu, \rho\beta\n\n\nabla f"}',
         {"a": "\\nu \\neq \\nu, \\rho\\beta\n\n\\nabla f"}),
        (r'{"a": "One\nless\tthan\nTwo\r\n\there\f"}',
         {"a": "One\nless\tthan\nTwo\r\n\there\f"}),
    ],
)  # fmt: skip
def test_json_of_a_reply(text, value):
    assert replies.parse(text) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("I cannot do that.", "no JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[" * 100_000, "nested too deep|no JSON"),
        ("1" + " " * replies.MAX_CHARACTERS, "expected at most"),
    ],
)
def test_replies_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        replies.parse(text)


def test_repairs_are_bounded_and_say_what_is_wrong(tmp_path):
    script = Script("no", '{"x": -1}', '{"x": 3}')
    ask = chat.Chat(script, cache=tmp_path)
    assert ask.structured(ASK, SCHEMA, positive) == {"x": 3}
    assert [m["role"] for m in script.sent[2]] == [
        *("user", "assistant", "user", "assistant", "user")
    ]
    assert "no JSON" in script.sent[1][-1]["content"]
    assert "x must be > 0, got -1" in script.sent[2][-1]["content"]
    assert ask.usage == chat.Usage(3, 0, 2, 0, 0, 30, 15)
    # The same again costs nothing; another sample is another request.
    again = chat.Chat(Script(), cache=tmp_path)
    assert again.structured(ASK, SCHEMA, positive) == {"x": 3}
    assert again.usage == chat.Usage(3, 3, 2)
    other = chat.Chat(Script("a", "b", "c"), cache=tmp_path)
    with pytest.raises(chat.BadReply, match="after 2 repairs: the reply is no JSON"):
        other.structured(ASK, SCHEMA, positive, sample=1)
    assert other.usage.failed == 1


def test_recorded_replies(tmp_path):
    chat.Chat(Script("hello"), cache=tmp_path).reply(ASK)
    recorded = chat.Chat(Script(), cache=tmp_path, recorded=True)
    assert recorded.reply(ASK).text == "hello"
    with pytest.raises(ValueError, match="no recorded reply .*json"):
        recorded.reply([*ASK, {"role": "user", "content": "more"}])
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["messages"] == ASK
    file.write_text(file.read_text()[:20])
    with pytest.raises(ValueError, match="a damaged reply .* remove the file"):
        recorded.reply(ASK)
    with pytest.raises(ValueError, match="need the folder"):
        chat.Chat(Script(), recorded=True)


def test_budget_and_estimate(tmp_path):
    ask = chat.Chat(Script("a", "b"), cache=tmp_path, budget=15)
    more = [[{"role": "user", "content": "x" * 40}], None]
    before = ask.estimate([(ASK, None), tuple(more)], tokens=7)
    assert (before.requests, before.cached, before.completion_tokens) == (2, 0, 14)
    assert before.prompt_tokens == 6 + 11
    ask.reply(ASK)
    assert ask.estimate([(ASK, None)]).cached == 1
    with pytest.raises(ValueError, match="15 tokens are spent, the budget is 15"):
        ask.reply(more[0])
    assert ask.usage.cost((1.0, 2.0)) == pytest.approx(2e-5)
    assert "cost 0.0000" in ask.usage.text((1.0, 2.0))


def test_a_stopped_run_goes_on(tmp_path):
    def items(ask):
        return chat.every(
            lambda i: ask.reply([{"role": "user", "content": str(i)}]).text, range(4), 1
        )

    with pytest.raises(IndexError):
        items(chat.Chat(Script("a", "b"), cache=tmp_path))
    rest = Script("c", "d")
    assert items(chat.Chat(rest, cache=tmp_path)) == ["a", "b", "c", "d"]
    assert len(rest.sent) == 2 and not list(tmp_path.glob("*.part"))


def test_every_keeps_bad_replies_in_place():
    def one(i):
        if i == 1:
            raise chat.BadReply("no")
        return i

    first, bad, last = chat.every(one, range(3))
    assert (first, last) == (0, 2) and isinstance(bad, chat.BadReply)


@contextlib.contextmanager
def server(*answers):
    """An endpoint that gives (status, body) in order, and what it was sent."""
    queue, sent = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            sent.append(json.loads(self.rfile.read(size)))
            status, body = queue.pop(0)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", sent
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def completion(text, reason="stop"):
    choice = {
        "index": 0, "finish_reason": reason,
        "message": {"role": "assistant", "content": text},
    }  # fmt: skip
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                 "choices": [choice], "usage": usage}  # fmt: skip


def endpoint(url, **options):
    return chat.Endpoint(
        model="m", url=url, key="TEST_CHAT_KEY", wait=0.0, retries=2, **options
    )


def test_an_endpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TEST_CHAT_KEY", "s3cret-value")
    caplog.set_level(logging.DEBUG)
    answers = [(429, {}), (503, {}), completion('{"x": 2}'),
               (400, {"error": {"message": "response_format is not supported"}}),
               completion('```json\n{"x": 4}\n```'),
               (400, {"error": {"message": "no model for s3cret-value"}}),
               (401, {"error": {"message": "bad key s3cr*** s3cret-value"}}),
               (500, {}), (500, {}), (500, {})]  # fmt: skip
    with server(*answers) as (url, sent):
        ask = chat.Chat(endpoint(url, temperature=0.5), cache=tmp_path)
        assert ask.structured(ASK, SCHEMA) == {"x": 2}
        assert ask.usage == chat.Usage(1, 0, 0, 0, 2, 7, 3)
        assert sent[2]["response_format"]["json_schema"]["schema"] == SCHEMA
        assert sent[2]["temperature"] == 0.5
        # An endpoint without schemas is asked for a block of JSON, and stays asked.
        assert ask.structured(ASK, SCHEMA, sample=1) == {"x": 4}
        assert "response_format" not in sent[4]
        assert "```json" in sent[4]["messages"][-1]["content"]
        with pytest.raises(ValueError, match=r"refuses the request: .*\*\*\*"):
            ask.reply(ASK)
        with pytest.raises(ValueError, match=r"refuses the key in TEST_CHAT_KEY \(401"):
            ask.reply(ASK)
        with pytest.raises(chat.Unreachable, match=f"{url}.*status 500.*2 retries"):
            ask.reply(ASK)
    with pytest.raises(chat.Unreachable, match=f"{url}.*2 retries; .*cache"):
        chat.Chat(endpoint(url)).reply(ASK)
    everything = caplog.text + "".join(f.read_text() for f in tmp_path.iterdir())
    assert "s3cret" not in everything


def test_a_refused_schema_is_no_failure(monkeypatch):
    """Without retries the plain request is still sent."""
    monkeypatch.setenv("TEST_CHAT_KEY", "x")
    refusal = 400, {"error": {"message": "response_format is not supported"}}
    with server(refusal, completion('{"x": 2}'), refusal) as (url, sent):
        options = {"model": "m", "url": url, "key": "TEST_CHAT_KEY", "wait": 0.0}
        ask = chat.Chat(chat.Endpoint(**options, retries=0))
        assert ask.structured(ASK, SCHEMA) == {"x": 2} and ask.usage.retries == 1
        assert "response_format" in sent[0] and "response_format" not in sent[1]
        with pytest.raises(ValueError, match="refuses the request"):
            ask.reply(ASK)  # It had none.


def test_a_reply_that_was_cut():
    class Cut:
        identity = {}

        def __call__(self, messages, schema):
            return chat.Reply('{"x": ', cut=True)

    with pytest.raises(chat.BadReply, match="cut at the limit of tokens"):
        chat.Chat(Cut(), repairs=0).structured(ASK, SCHEMA)


def test_refused_options(monkeypatch):
    monkeypatch.delenv("TEST_CHAT_KEY", raising=False)
    with pytest.raises(ValueError, match="TEST_CHAT_KEY is not set"):
        chat.Chat(endpoint("http://127.0.0.1:9/v1")).reply(ASK)
    for field, value in {"model": "", "url": "ftp://x", "max_tokens": 0,
                         "retries": -1, "timeout": 0.0}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"chat.{field}"):
            chat.Endpoint(**{"model": "m", field: value})
    with pytest.raises(ValueError, match="repairs and budget"):
        chat.Chat(Script(), repairs=-1)

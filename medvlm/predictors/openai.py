"""Any server that speaks OpenAI's chat protocol; only with a flag that says that images leave this program.

The flag is asked for on every address, this machine's own included: a local port is often the end of a tunnel or a gateway.
Pictures are sent as PNG without any header; ids, file names and everything else that we know of a study stay here.

Source: OpenAI API reference, "Create chat completion" (messages, image_url, logprobs; at most 20 top_logprobs).
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from ..errors import ModelError
from ..sample import Answer
from .chat import Chat, Request, pictures

TIMEOUT = 120.0
"""Seconds that a server may take for one answer."""
TRIES, WAIT, LONGEST_WAIT = 4, 1.0, 30.0
"""Requests until one is given up; seconds before the second, doubled each time, unless the server names its own."""
RETRIED = {408, 429, 500, 502, 503, 504}
CONCURRENT = 4
REPLY_LIMIT = 16 << 20
"""Bytes of a server's answer that are read."""
TOLD = 0.5
"""A closed question's probabilities are given where the choices hold at least this share of the first word's chance."""
PICK = "Answer with exactly one of: {}."

log = logging.getLogger(__name__)


def load(address: str, allow_upload: bool = False) -> OpenAIModel:
    """The model behind "http(s)://host:port/v1#MODEL"; without "#MODEL", the only one that the server lists.

    The key is read from the environment variable OPENAI_API_KEY, and sent over https or to this machine only.

    Raises:
        ModelError: UPLOAD_NOT_ALLOWED without ``allow_upload``; BAD_ARGUMENT for an address that cannot be used, or several
            models to choose from; SERVER_ERROR when the server does not answer.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ModelError("the address after openai: is no address", "BAD_ARGUMENT", "give openai:http://host:port/v1#MODEL") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise ModelError("the address after openai: must be http(s)://host:port/v1, without a user or password", "BAD_ARGUMENT",
                         "give openai:http://host:port/v1#MODEL; the key goes into the variable OPENAI_API_KEY")  # fmt: skip
    place = f"{host}:{port}" if port else host
    if not allow_upload:
        raise ModelError(f"images and questions would be sent to {place}", "UPLOAD_NOT_ALLOWED")
    key = os.environ.get("OPENAI_API_KEY")
    if key and parts.scheme == "http" and not _here(host):
        raise ModelError(f"the key in OPENAI_API_KEY would travel to {place} unencrypted", "BAD_ARGUMENT", "use https, or unset the variable")
    model = OpenAIModel(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", parts.query, place, key, parts.fragment, direct=_here(host))
    if not model.name:
        model.name = model.only()
    return model


class OpenAIModel(Chat):
    """A server's model. Its probabilities come from the server's log-probabilities, and are NaN where it gives none.

    A closed question ends with the choices; its probabilities are those of the first word of the answer.
    """

    def __init__(self, url: str, query: str, place: str, key: str | None, name: str, direct: bool):
        self.url, self.query, self.place, self.key, self.name, self.version = url, query, place, key, name, f"served by {place}"
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if direct:  # a proxy of the environment would carry what is meant for this machine away from it
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._left_out: set[str] = set()

    def only(self) -> str:
        """The only model that the server lists."""
        reply = self._json(*self._send("/models"))
        try:
            names = [str(m["id"]) for m in reply["data"]]
        except (KeyError, TypeError) as error:
            raise ModelError(f"{self.place} does not list its models", "SERVER_ERROR", "name one: openai:http://host:port/v1#MODEL") from error
        if len(names) != 1:
            there = ", ".join(names[:20]) or "none"
            raise ModelError(f"{self.place} has {len(names)} models: {there}", "BAD_ARGUMENT", "name one: openai:http://host:port/v1#MODEL")
        return names[0]

    def replies(self, requests):
        try:
            shown = self._encoded(requests[0])
        except Exception as error:  # a damaged image shows only when it is read
            return [error] * len(requests)

        def one(asked: Request) -> Answer | Exception:
            try:
                return self._reply_to(asked, shown)
            except Exception as error:  # one of them must not lose the others
                return error

        with ThreadPoolExecutor(CONCURRENT) as pool:
            return list(pool.map(one, requests))

    def _encoded(self, asked: Request) -> dict[int, list[str]]:
        """{id of an image object: its pictures as data URIs}."""
        for image in asked.images:
            if image.info.get("burned_in"):
                raise ModelError(f"the header of image {image.id} says that text is burned into its pixels", "BURNED_IN")
        return {id(image): [_data_uri(page) for page in pictures(image)] for image in asked.images}

    def _reply_to(self, asked: Request, shown: Mapping[int, list[str]]) -> Answer:
        *before, (role, parts) = asked.messages
        if asked.choices:
            parts = (*parts, f"\n{PICK.format(', '.join(asked.choices))}")
        messages = [_message(*message, shown) for message in (*before, (role, parts))]
        reply = self._complete({"model": self.name, "messages": messages}, asked.most)
        try:
            (said, *_) = reply["choices"]
            text, reason = said["message"]["content"], said.get("finish_reason")
            if not isinstance(text, str):
                raise ModelError(f"{self.name} gave no text ({_word(reason)})", "SERVER_ERROR", "the server may have filtered the question")
            tokens = (said.get("logprobs") or {}).get("content") or []
            chances = _chances(tokens, asked.choices) if asked.choices else None
            whole = math.exp(sum(t["logprob"] for t in tokens)) if tokens else math.nan
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.place} answers with something that is no chat completion", "SERVER_ERROR") from error
        if reason == "length":
            log.warning("%s: the answer was cut at %d tokens", self.name, asked.most)
        if chances:
            text = self._pick(chances)
            return Answer(text, chances[text], chances)
        text = text.strip()
        if asked.choices:
            text = next((c for c in sorted(asked.choices, key=len, reverse=True) if re.match(rf"\W*{re.escape(c)}\b", text, re.I)), text)
            return Answer(text, math.nan)
        return Answer(text, whole)

    def _complete(self, body: dict, most: int):
        """A chat completion; an option that the server names while it refuses is left out from then on."""
        while True:
            options = {"temperature": self.temperature, "logprobs": True, "top_logprobs": 20, "max_tokens": most}
            sent = {k: v for k, v in options.items() if k not in self._left_out}
            if "max_tokens" in self._left_out:
                sent["max_completion_tokens"] = most  # OpenAI's newer name
            status, raw = self._send("/chat/completions", body | sent)
            refused = {k for k in options.keys() & sent.keys() if re.search(rf"\b{k}\b".encode(), raw)} if status in (400, 422) else set()
            if refused & {"logprobs", "top_logprobs"}:
                refused |= {"logprobs", "top_logprobs"}
            if not refused:
                return self._json(status, raw)
            self._left_out |= refused
            log.warning("%s does not take %s; left out", self.place, ", ".join(sorted(refused)))

    def _send(self, path: str, body: dict | None = None) -> tuple[int, bytes]:
        """(HTTP status, answer) once the server has answered with something that is no reason to try again."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "medvlm"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        url = self.url + path + (f"?{self.query}" if self.query else "")
        for attempt in itertools.count(1):
            asked = None
            try:
                with self._opener.open(urllib.request.Request(url, data, headers), timeout=TIMEOUT) as reply:
                    return reply.status, reply.read(REPLY_LIMIT)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in RETRIED or attempt == TRIES:
                        return error.code, error.read(REPLY_LIMIT)
                    asked = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                reason = getattr(error, "reason", error)
                if attempt == TRIES or isinstance(reason, ConnectionRefusedError):
                    raise ModelError(f"{self.place} does not answer ({type(reason).__name__})", "SERVER_ERROR") from None  # its text may hold the address
            named = float(asked) if asked and re.fullmatch(r"\d{1,6}(\.\d+)?", asked) else 0.0
            time.sleep(min(named or WAIT * 2 ** (attempt - 1), LONGEST_WAIT))

    def _json(self, status: int, raw: bytes):
        try:
            reply = json.loads(raw)
        except ValueError:
            reply = None
        if status >= 300 or not isinstance(reply, dict):
            said = reply.get("error") if isinstance(reply, dict) else None
            code = _word(said.get("code") or said.get("type")) if isinstance(said, dict) else "no reason given"
            raise ModelError(f"{self.place} answers HTTP {status} ({code})", "SERVER_ERROR")
        return reply


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry images and key to where nobody allowed them to go."""

    def redirect_request(self, *_, **__):
        return None


def _message(role: str, parts: Sequence, shown: Mapping[int, list[str]]) -> dict:
    if all(isinstance(part, str) for part in parts):
        return {"role": role, "content": "".join(parts)}
    content: list[dict] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content += [{"type": "image_url", "image_url": {"url": uri}} for uri in shown[id(part)]]
    return {"role": role, "content": content}


def _data_uri(page) -> str:
    raw = io.BytesIO()
    page.save(raw, "PNG")
    return "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()


def _chances(tokens: Sequence[Mapping], choices: Sequence[str]) -> dict[str, float] | None:
    """{choice: probability} from the first word's likeliest tokens; None where they do not tell the choices apart."""
    first = next((t for t in tokens if t["token"].strip()), None)
    found = dict.fromkeys(choices, 0.0)
    for option in (first or {}).get("top_logprobs") or ():
        word = option["token"].strip().lower()
        meant = [c for c in choices if word and (c.lower().startswith(word) or re.match(rf"{re.escape(c.lower())}\b", word))]
        if len(meant) == 1:
            found[meant[0]] += math.exp(option["logprob"])
    total = sum(found.values())
    return {c: p / total for c, p in found.items()} if total >= TOLD else None


def _here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _word(said) -> str:
    """A server's code as it stands, if it is one; its sentences may quote the question or the key."""
    return said if isinstance(said, str) and re.fullmatch(r"[a-z_]{1,40}", said) else "no reason given"

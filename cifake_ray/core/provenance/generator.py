"""Name the generator that an image's texts give away.

Free text counts only if it holds the settings of a generation, never for a name in it: captions
speak of generators too. Fields that name a program count if it is a generator that is listed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

MAX_CHARS = 200

_SETTINGS = (
    (re.compile(r"(?:^|[\n,] ?)Steps: \d{1,5}, "), "Stable Diffusion parameters"),
    (re.compile(r'"class_type"\s*:|"last_node_id"\s*:'), "ComfyUI"),
    (re.compile(r'"sui_image_params"\s*:'), "SwarmUI"),
    (re.compile(r'"(?:positive_prompt|invokeai_version)"\s*:'), "InvokeAI"),
    (re.compile(r'"(?:base_model|Base Model)"\s*:'), "Fooocus"),
    (re.compile(r'"request_type"\s*:\s*"PromptGenerateRequest"'), "NovelAI"),
    (re.compile(r"Job ID: [0-9a-f]{8}-[0-9a-f]{4}-"), "Midjourney"),
)
_APP = re.compile(r", App: ([^,\n]{1,60})")
_MODEL = re.compile(
    r'(?:ckpt_name|unet_name|base_model|model_name|"model)"\s*:\s*"([^"]{1,120})"'
    r"|(?:^|[\n,] ?)Model: ([^,\n]{1,120})"
)
_PROGRAMS = re.compile(
    r"Midjourney|DALL[ \u00b7.-]?E\b|Stable ?Diffusion|ComfyUI|AUTOMATIC1111|SD\.Next|InvokeAI"
    r"|Fooocus|SwarmUI|NovelAI|Adobe Firefly|ChatGPT|\bGPT-4o\b|gpt-image|OpenAI|Google AI\b"
    r"|Nano Banana|\bImagen \d|\bGrok\b|xAI\b|Ideogram|Leonardo\.? ?AI|FLUX\.[12]|Black Forest Labs"
    r"|Stability AI|DreamStudio|Draw Things|DiffusionBee|Seedream|Jimeng"
    r"|\u5373\u68a6|Doubao|\u8c46\u5305|Kling"
    r"|Qwen-Image|Hunyuan|Recraft|\bKrea\b|Craiyon|NightCafe|Bing Image Creator|Playground AI",
    re.IGNORECASE,
)


def find_generator(
    settings: Iterable[str], programs: Iterable[str], producers: Iterable[str]
) -> str | None:
    """Return a line on the generator, at most MAX_CHARS; None if nothing names one.

    `settings`: texts that may hold those of a generation; `programs`: names of software, which
    count if it generates images; `producers`: names beside the label of TC260, which all count.
    """
    for text in settings:
        if found := _describe_settings(text):
            return shorten(found)
    for text in programs:
        if _PROGRAMS.search(text):
            return shorten(text)
    return next((shorten(f"TC260: {producer}") for producer in producers if producer), None)


def _describe_settings(text: str) -> str | None:
    name = next((name for pattern, name in _SETTINGS if pattern.search(text)), None)
    if name is None:
        return None
    app, model = _APP.search(text), _MODEL.search(text)
    name = app[1] if app else name
    return f"{name}: {model[1] or model[2]}" if model else name


def read_tc260(texts: Iterable[str]) -> tuple[str | None, str | None]:
    """Return label and producer of the first text that is the AIGC label of TC260, else None.

    The label is "1" (generated), "2" (possibly) or "3" (suspected), or what a file has instead.
    Source: GB 45438-2025, annex E.
    """
    for text in texts:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("AIGC"), dict):
            found = found["AIGC"]
        if isinstance(found, dict) and isinstance(found.get("Label"), str | int):
            producer = found.get("ContentProducer")
            label = shorten(str(found["Label"]))
            return label, producer if isinstance(producer, str) else None
    return None, None


def shorten(text: str) -> str:
    """Return a text on one line, printable and at most MAX_CHARS."""
    text = " ".join(text[: 4 * MAX_CHARS].split())
    return "".join(char if char.isprintable() else "\ufffd" for char in text[:MAX_CHARS])

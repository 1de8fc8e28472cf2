"""The page on which people vote, which eval_mi.py --ballot writes; eval_mi.py --votes counts what it saves.

A question shows a reference clip, a text, and a candidate of every variant, in an order drawn for each
participant. Two questions are attention checks. Nothing on the page tells a variant or a check; ballot.json
does, which stays with whoever counts.
"""

import base64
import collections
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

VOTE_FIELDS = ["run", "participant", "place", "question", "shown", "choice"]

# Which candidate moves most like the reference and shows the prompt? Frames are (F,h,w,3) uint8. id and the
# keys of candidates are opaque; every question has a candidate of every variant of the ballot. caption, what
# the reference shows, is the prompt of an attention check.
Question = collections.namedtuple("Question", "id prompt reference candidates caption")


def opaque(letter, *what):
    """An id that tells nothing. It begins with a letter, or a spreadsheet takes 728957227716 for a number."""
    return letter + hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def attention_checks(questions, run_id):
    """Two questions whose answer is beyond doubt -> [(Question, id of the right candidate)].
    One candidate is the reference itself, under its own caption; the others stand still. The references that
    change most are taken; one that never moves would make everybody fail. Nothing in the page marks a check.
    """
    def change(q):
        """How much a question's reference changes from frame to frame."""
        return np.abs(np.diff(q.reference.astype(int), axis=0)).mean()

    clips = {q.reference.tobytes(): q for q in questions}            # a clip once, though it has many prompts
    moving, checks = sorted(filter(change, clips.values()), key=change, reverse=True), []
    for n, q in enumerate([*moving, *moving][:2]):
        stills = np.linspace(0, len(q.reference) - 1, len(q.candidates) - 1).astype(int)
        shown = [q.reference, *(np.repeat(q.reference[i:i + 1], len(q.reference), axis=0) for i in stills)]
        ids = [opaque("c", run_id, n, i) for i in range(len(shown))]
        check = Question(opaque("q", run_id, n), q.caption, q.reference, dict(zip(ids, shown)), q.caption)
        checks.append((check, ids[0]))
    return checks


def ballot_page(questions, run_id, fps):
    """The page on which people vote -> its text: one file that needs no server and no network.
    questions: the worked example, which ballot.html explains, then the questions and attention checks, which
    every participant sees in an order of their own. At the end they save votes-ID.csv. Texts reach the page
    as JSON with no character that could end a script, and are put in as text; the policy in its head lets
    nothing load but this style, this script and the pictures in the page.
    """
    # Sorted by their opaque ids: the order in the page says nothing about variants or checks.
    example, *questions = questions
    # Strips of small clips are lossless: enlarged on the page, they would show every trace of compression.
    data = json.dumps({"run": run_id, "fps": fps, "fields": VOTE_FIELDS, "questions": [
        {"id": q.id, "prompt": q.prompt, "reference": film_strip(q.reference),
         "candidates": {key: film_strip(q.candidates[key]) for key in sorted(q.candidates)}}
        for q in [example, *sorted(questions, key=lambda q: q.id)]]})
    for character in "<>&":                                      # json.dumps itself escapes all but ASCII
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = Path(__file__).with_name("ballot.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    for kind in ("style", "script"):                             # the hash of the very text between the tags
        text = re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1]
        policy += f"; {kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return page.replace("POLICY", policy, 1).replace("QUESTIONS", data, 1)


def film_strip(frames, most=320, lossless=128):
    """A clip (F,h,w,3) uint8 as one picture, its frames side by side: {"frames": F, "src": data URI}.
    most, lossless: the widths in pixels above which a frame is reduced, and is compressed with losses.
    """
    count, height, width = frames.shape[:3]
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    side = min(width, most, 16383 // count)                      # WebP pictures are at most 16383 pixels wide
    if side < width:
        strip = strip.resize((side * count, side * height // width), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    strip.save(file, "WEBP", quality=82, lossless=side <= lossless)
    return {"frames": count, "src": f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"}

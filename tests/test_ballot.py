"""The voting page in a real browser, and its votes: from a participant's keys and fingers to shares."""
import base64
import csv
import hashlib
import re
import shutil
import string

import numpy as np
import pytest

import eval_mi
import mini_mi
from data import world

RUN, FPS = "rc0ffee42", 10
VARIANTS = ("full", "no-mqk", "no-mv", "base")
SCRIPT = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PROMPTS = ("a red star on a teal plain background", SCRIPT, "<b>bold</b> & \u2028 &amp; \"quoted\"",
           "ein grüner Käfer")


def opaque(text):
    """An id as the program makes them: of a question or a candidate."""
    return ("q" if text.startswith("question") else "c") + eval_mi.digest(text)


def make_questions():
    """Two references with two prompts each; the candidates are noise, which no two variants share."""
    rng, made = np.random.default_rng(0), []
    for i, prompt in enumerate(PROMPTS):
        scene = world.scene(5 + i // 2, ["line", "zigzag"][i // 2:][:1])
        candidates = {opaque(f"{i} {v}"): rng.integers(0, 256, (8, 32, 32, 3), np.uint8) for v in VARIANTS}
        made.append(eval_mi.Question(opaque(f"question {i}"), prompt, world.render(scene, 8, 32), candidates,
                                     world.caption(scene)))
    return made


QUESTIONS = make_questions()
VARIANT_OF = {key: v for i in range(4) for v in VARIANTS for key in [opaque(f"{i} {v}")]}
CHECKS = eval_mi.attention_checks(QUESTIONS, RUN)
RIGHT = {q.id: right for q, right in CHECKS}
EVERYTHING = {q.id: q for q in [*QUESTIONS, *(q for q, _ in CHECKS)]}
EXAMPLE = eval_mi.Question("example", "a clip", QUESTIONS[0].reference,
                          dict.fromkeys(["still", "same", "right", "other"], QUESTIONS[0].reference), "")
# As ballot.json keeps it.
BALLOT = {"run": RUN, "variants": VARIANTS,
          "questions": {q.id: {key: VARIANT_OF[key] for key in q.candidates} for q in QUESTIONS},
          "checks": {q.id: {"right": right, "candidates": list(q.candidates)} for q, right in CHECKS}}
# What the three participants choose, question by question of QUESTIONS.
WISHES = {"keyboard": ["full"] * 4, "touch": ["full", "full", "no-mqk", "base"],
          "returning": ["no-mv", "full", "no-mqk", "full"]}


def wanted(wish):
    """Question id -> candidate id, the right answers of the example and both checks among them."""
    votes = {q.id: opaque(f"{i} {v}") for i, (q, v) in enumerate(zip(QUESTIONS, wish))}
    return {**votes, **RIGHT, "example": "right"}


def rows_of(participant, choices, run=RUN, shown=None):
    """The rows that the page saves, in the order of `choices`: question id -> candidate id."""
    return [[run, participant, str(n), question, shown or "|".join(EVERYTHING[question].candidates), choice]
            for n, (question, choice) in enumerate(choices.items(), start=1)]


def save(path, rows, fields=eval_mi.VOTE_FIELDS, **options):
    """A file of votes."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([fields, *rows])
    return path


def answers(wish):
    """The choices that a participant's file holds."""
    return {key: choice for key, choice in wanted(wish).items() if key != "example"}


# --------------------------------------------------------------------------------------------- reading votes

def test_votes_are_merged_each_question_once(tmp_path):
    paths = [tmp_path / f"votes-{name}.csv" for name in ("b (10)", "b (2)", "a")]
    save(paths[2], rows_of("a", answers(WISHES["touch"])))
    # The same participant saved again after a change of mind: a browser adds (2) and (10) to the name.
    save(paths[0], rows_of("b", answers(WISHES["keyboard"])))
    save(paths[1], rows_of("b", answers(["base", "full", "no-mqk", "base"])))
    votes, notes = eval_mi.read_votes(paths, BALLOT)
    assert votes == [(p, variant) for p, wish in (("a", "touch"), ("b", "keyboard"))
                     for variant in WISHES[wish]]
    assert len(votes) == 8 and notes == []


def test_spreadsheets_change_a_file_and_it_still_counts(tmp_path):
    path = save(tmp_path / "votes.csv", rows_of("a", answers(WISHES["touch"])), delimiter=";")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(eval_mi.read_votes([path], BALLOT)[0]) == 4


@pytest.mark.parametrize("careless", ["wrong", "missing"])
def test_who_fails_a_check_is_left_out_and_counted(tmp_path, careless):
    check = next(iter(RIGHT))
    chosen = answers(WISHES["touch"])
    if careless == "wrong":
        chosen[check] = next(c for c in EVERYTHING[check].candidates if c != RIGHT[check])
    else:
        del chosen[check]
    save(tmp_path / "a.csv", rows_of("a", chosen))
    save(tmp_path / "b.csv", rows_of("b", answers(WISHES["keyboard"])))
    votes, notes = eval_mi.read_votes([tmp_path / "a.csv", tmp_path / "b.csv"], BALLOT)
    assert {person for person, _ in votes} == {"b"} and len(votes) == 4
    assert len(notes) == 1 and notes[0].startswith("1 of 2 participants left out")


GOOD = rows_of("a", answers(WISHES["keyboard"]))


@pytest.mark.parametrize("content, said", [
    (dict(rows=rows_of("a", answers(WISHES["touch"]), run="r0ther")), "line 2, run: "),
    (dict(rows=GOOD, fields=["participant", "scene", "options", "choice", "check", "x"]), "columns"),
    (dict(rows=[*GOOD, GOOD[0][:5]]), "columns"), (dict(rows=[*GOOD, [*GOOD[0], "more"]]), "columns"),
    (dict(rows=[]), "no vote"),
    # What a spreadsheet, or a hand, has changed is named by its line and column, and quoted.
    (dict(rows=[*GOOD[:2], [*GOOD[2][:5], "1.2E+11"]]), "line 4, choice: "),
    (dict(rows=[*GOOD[:1], [*GOOD[1][:3], "728957227716", *GOOD[1][4:]]]), "write '728957227716'"),
    (dict(rows=[[*GOOD[0][:4], "a|b", GOOD[0][5]]]), "line 2, shown: "),
    (dict(rows=[[RUN, "", *GOOD[0][2:]]]), "line 2, participant: "),
    (b"\xff\xfe\x00", "utf-8"), (b"", "no vote"), (b"\x00\x01\x02,\r\r\n\x00", ""),
    (b'"' + b"x" * 200_000, "field larger than")])
def test_a_file_that_is_not_of_this_run_is_named_in_one_line(tmp_path, content, said):
    bad = tmp_path / "bad.csv"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        save(bad, **content)
    good = save(tmp_path / "good.csv", GOOD)
    votes, notes = eval_mi.read_votes([bad, good], BALLOT)
    assert len(votes) == 4 and len(notes) == 1 and said in notes[0]
    assert notes[0].startswith(f"{bad} left out: ") and "\n" not in notes[0]


def test_a_file_that_is_not_there_is_an_error_and_no_vote_is_no_number(tmp_path):
    with pytest.raises(mini_mi.UserError, match="nowhere"):
        eval_mi.parse(["--votes", str(tmp_path / "nowhere")])
    assert eval_mi.preference([], [], VARIANTS) == {"shares": {}, "tests": {}, "notes": []}


def votes_of(wishes):
    """Votes without files: participant -> wish."""
    return [(name, variant) for name, wish in wishes.items() for variant in wish]


def test_preference_worked_by_hand():
    """12 votes: full 4 + 2 + 2, no-mqk 0 + 1 + 1, no-mv 0 + 0 + 1, base 0 + 1 + 0."""
    counted = eval_mi.preference(votes_of(WISHES), [], VARIANTS)
    found, tests = counted["shares"], counted["tests"]
    assert {name: row["share"] for name, row in found.items()} == pytest.approx(
        {"full": 8 / 12, "no-mqk": 2 / 12, "no-mv": 1 / 12, "base": 1 / 12})
    for row in found.values():
        assert (row["n"], row["participants"], row["chance"]) == (12, 3, 1 / 4)
    assert counted["notes"] == ["a trial with fewer than 5 participants, not a result"]
    # Participants chose full in 4, 2, 2 of 4: a bootstrap over them spans 1/2 to 1, Wilson begins at 0.391.
    assert found["full"]["high"] == 1 and found["full"]["low"] == pytest.approx(0.391, abs=1e-3)
    # Per participant full minus no-mqk: 1, 1/4, 1/4; all of one sign: p = 2 / 2^3. Minus no-mv: 1, 1/2, 1/4.
    assert list(tests) == ["no-mqk", "no-mv"]
    assert (tests["no-mqk"][0], tests["no-mqk"][3]) == (pytest.approx(1 / 2), 1 / 4)
    assert (tests["no-mv"][0], tests["no-mv"][3]) == (pytest.approx(7 / 12), 1 / 4)


def test_preference_of_those_who_agree_and_of_one():
    five = eval_mi.preference(votes_of({name: ["full"] * 4 for name in "abcde"}), [], VARIANTS)
    row = five["shares"]["full"]
    assert five["notes"] == [] and (row["low"], row["high"]) == eval_mi.wilson_interval(20, 20)
    one = eval_mi.preference(votes_of({"a": WISHES["touch"]}), [], VARIANTS)
    assert one["shares"]["full"]["share"] == 1 / 2
    assert one["tests"]["no-mqk"][3] == 1                                 # one person is no test
    # The interval is that of people, not of votes: each of these always votes alike.
    split = {str(n): ["full" if n % 2 else "base"] * 4 for n in range(10)}
    row = eval_mi.preference(votes_of(split), [], VARIANTS)["shares"]["full"]
    low, high = eval_mi.wilson_interval(20, 40)
    assert row["low"] < low and high < row["high"]


# ------------------------------------------------------------------------------------------- what is written

def test_attention_checks_are_found_again_and_look_like_other_questions():
    again = eval_mi.attention_checks(make_questions(), RUN)
    assert [(q.id, right) for q, right in CHECKS] == [(q.id, right) for q, right in again]
    assert len(RIGHT) == 2 and {q.caption for q in QUESTIONS} == {q.prompt for q, _ in CHECKS}
    for q, right in CHECKS:
        assert len(q.id) == len(QUESTIONS[0].id) and {len(key) for key in q.candidates} == {13}
        assert len(q.candidates) == 4 and np.array_equal(q.candidates[right], q.reference)
        still = [frames for key, frames in q.candidates.items() if key != right]
        assert all((frames == frames[:1]).all() for frames in still)
    assert set(RIGHT).isdisjoint(q.id for q, _ in eval_mi.attention_checks(QUESTIONS, "0ther"))
    # One clip alone gives both; a clip that never moves gives none, since nobody could pass it.
    assert len({q.id for q, _ in eval_mi.attention_checks(QUESTIONS[:1], RUN)}) == 2
    still = np.zeros((8, 32, 32, 3), np.uint8)
    frozen = eval_mi.Question("ab", "x", still, {"cd": still, "ef": still}, "x")
    assert eval_mi.attention_checks([frozen], RUN) == []


def test_a_film_strip_holds_every_frame_and_long_clips_fit():
    strip = eval_mi.film_strip(np.zeros((48, 40, 720, 3), np.uint8))
    assert strip["frames"] == 48 and strip["src"].startswith("data:image/webp;base64,")
    assert eval_mi.film_strip(np.zeros((200, 8, 128, 3), np.uint8))["frames"] == 200


@pytest.fixture(scope="session")
def ballot(tmp_path_factory):
    """The page of QUESTIONS."""
    path = tmp_path_factory.mktemp("ballot") / "ballot.html"
    path.write_text(eval_mi.ballot_page([EXAMPLE, *EVERYTHING.values()], RUN, FPS), encoding="utf-8")
    return path


def test_the_page_names_no_variant_and_no_outside_address(ballot):
    page = re.sub(r"data:image/webp;base64,[\w+/=]+", "", ballot.read_text(encoding="utf-8"))
    for name in [*eval_mi.VARIANTS, "ablation", "attention", "check"]:
        assert not re.search(rf"(?<![\w-]){name}(?![\w-])", page), name
    assert "://" not in page and page.count("<script") == 2 and page.count("</script>") == 2
    assert "default-src 'none'" in page and "unsafe" not in page
    assert "\u2028" not in page and "<b>bold" not in page
    found = [page.index(f'"{q.id}"') for q in QUESTIONS] + [page.index(f'"{key}"') for key in RIGHT]
    ids = [q.id for q in QUESTIONS] + list(RIGHT)
    assert sorted(ids) == [i for _, i in sorted(zip(found, ids))]   # by id: no other order shows


def test_the_policy_names_the_style_and_the_script_of_the_page():
    """Where they were changed, the message has the line that belongs into data/ballot.html."""
    page = (mini_mi.HERE / "data" / "ballot.html").read_text(encoding="utf-8")
    for kind in ("style", "script"):
        text = re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page


# ---------------------------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="session")
def chromium():
    """Playwright's driver and how Debian's Chromium is started."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="left out: playwright is not installed")
    program = shutil.which("chromium")
    if not program:
        pytest.skip("left out: no chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as driver:
        yield driver.chromium, dict(executable_path=program, args=["--no-sandbox"])


@pytest.fixture(scope="session")
def browser(chromium):
    """A headless Chromium."""
    launcher, how = chromium
    running = launcher.launch(**how)
    yield running
    running.close()


@pytest.fixture
def visit(browser, ballot):
    """visit(**options of a new participant's window) -> the ballot in it."""
    contexts = []

    def visit(script=None, **options):
        contexts.append(browser.new_context(**options))
        if script:
            contexts[-1].add_init_script(script)
        return opened(contexts[-1].new_page(), ballot)

    yield visit
    for context in contexts:
        context.close()


def opened(page, ballot):
    """Opens the ballot from disk; page.trouble collects what goes wrong, page.asked all addresses."""
    page.trouble, page.asked = [], []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(ballot.as_uri())
    until(page, "clips.length > 0")
    return page


def until(page, expression):
    """Waits for it to hold. Playwright's own way evaluates text in the page, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never: {expression}")


def place_of(page, choices):
    """Which button of the present question shows the wanted candidate, counted from 0."""
    buttons = page.locator("#candidates button").evaluate_all("all => all.map(button => button.value)")
    return buttons.index(choices[page.evaluate("question().id")])


def by_key(page, choices):
    """Answers one question by keyboard."""
    page.keyboard.press(str(place_of(page, choices) + 1))
    page.keyboard.press("Enter")


def by_touch(page, choices):
    """Answers one question by finger."""
    page.locator("#candidates button").nth(place_of(page, choices)).tap()
    page.locator("#next").tap()


def download(page, folder):
    """Saves the votes; the file, whose name and text must be those that the page shows."""
    with page.expect_download() as waiting:
        page.click("#save")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    assert re.fullmatch(r"votes-p[0-9a-f]{16}\.csv", path.name)
    assert path.read_text() == page.input_value("#text")
    return path


@pytest.fixture(scope="session")
def saved(browser, chromium, ballot, tmp_path_factory):
    """The files of three participants: by keyboard, by touch on a phone, and of one who comes back."""
    folder, found = tmp_path_factory.mktemp("votes"), {}

    context = browser.new_context()
    page = opened(context.new_page(), ballot)
    choices = wanted(WISHES["keyboard"])
    assert page.inner_text("#progress") == "First an example"
    page.keyboard.press("Enter")                                    # nothing is chosen: nothing happens
    page.keyboard.press("Backspace")
    wrong = (place_of(page, choices) + 1) % 4
    page.keyboard.press(str(wrong + 1))                             # a wrong answer is explained, no more
    page.keyboard.press("Enter")
    assert page.inner_text("#progress") == "First an example" and "This clip" in page.inner_text("#reason")
    by_key(page, choices)
    for n in range(1, 7):
        assert page.inner_text("#progress") == f"{n} of 6"
        page.keyboard.press("Enter")
        page.keyboard.press("9")
        assert page.inner_text("#progress") == f"{n} of 6"
        if n == 3:                                                  # back, another answer, back, the first
            page.keyboard.press("Backspace")
            right = page.locator("[aria-pressed=true]")
            assert page.inner_text("#progress") == "2 of 6" and right.count() == 1
            page.keyboard.press(str((place_of(page, choices) + 1) % 4 + 1))
            page.keyboard.press("Enter")
            page.keyboard.press("Backspace")
            by_key(page, choices)
        by_key(page, choices)
    page.keyboard.press("Backspace")
    assert page.inner_text("#progress") == "6 of 6"
    page.keyboard.press("Enter")
    found["keyboard"] = download(page, folder)
    assert page.trouble == [] and all(url.startswith(("file:", "data:", "blob:")) for url in page.asked)
    assert page.title() == "Which clip moves like the reference?"   # the prompt that is a script did not run
    context.close()

    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = opened(context.new_page(), ballot)
    for n in range(7):
        boxes = [button.bounding_box() for button in page.locator("#candidates button").all()]
        assert len({box["y"] for box in boxes}) == 2 and min(box["width"] for box in boxes) > 140  # two a row
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        controls = [button.bounding_box() for button in page.locator("nav button:visible").all()]
        assert min(box["height"] for box in controls) >= 44
        by_touch(page, wanted(WISHES["touch"]))
    found["touch"] = download(page, folder)
    assert page.trouble == []
    context.close()

    launcher, how = chromium
    profile = tmp_path_factory.mktemp("profile")
    context = launcher.launch_persistent_context(profile, **how)
    page = opened(context.new_page(), ballot)
    for _ in range(4):
        by_key(page, wanted(WISHES["returning"]))
    page.keyboard.press(str(place_of(page, wanted(WISHES["returning"])) + 1))       # chosen, not yet gone on
    before = page.evaluate("JSON.stringify(state)")
    context.close()
    context = launcher.launch_persistent_context(profile, **how)
    page = opened(context.new_page(), ballot)
    assert page.inner_text("#progress") == "4 of 6" and page.locator("[aria-pressed=true]").count() == 1
    assert page.evaluate("JSON.stringify(state)") == before
    for _ in range(3):
        by_key(page, wanted(WISHES["returning"]))
    found["returning"] = download(page, folder)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#another")                                          # the next person begins anew
    until(page, "typeof clips !== 'undefined' && clips.length > 0")
    assert page.inner_text("#progress") == "First an example"
    assert page.evaluate("state.participant") not in before
    context.close()
    return found


def test_the_three_files_fill_the_column(saved):
    votes, notes = eval_mi.read_votes(saved.values(), BALLOT)
    assert notes == [] and len(votes) == 12
    counted = eval_mi.preference(votes, notes, VARIANTS)
    found = counted["shares"]
    assert {name: row["share"] for name, row in found.items()} == pytest.approx(
        {"full": 8 / 12, "no-mqk": 2 / 12, "no-mv": 1 / 12, "base": 1 / 12})
    assert counted["tests"]["no-mqk"][3] == 1 / 4


def test_order_is_of_each_participant_and_no_name_is_in_a_file(saved):
    rows = {name: list(csv.DictReader(open(path))) for name, path in saved.items()}
    assert len({row["participant"] for table in rows.values() for row in table}) == 3
    assert len({tuple(row["question"] for row in table) for table in rows.values()}) > 1
    shown = [{row["question"]: row["shown"] for row in table} for table in rows.values()]
    assert len({tuple(sorted(s.items())) for s in shown}) == 3
    for path in saved.values():
        assert not re.search("full|mqk|mv|base|check", path.read_text()), path


def test_a_prompt_is_shown_as_it_was_written_and_nothing_else_can_run_or_load(visit):
    page, seen = visit(), set()
    for _ in range(7):
        seen.add(page.locator("#prompt").text_content())
        by_key(page, wanted(WISHES["touch"]))
    assert {*PROMPTS, *(q.caption for q in QUESTIONS)} <= seen
    broken = page.evaluate("""async () => {
        const broken = [];
        addEventListener("securitypolicyviolation", event => broken.push(event.effectiveDirective));
        const [script, style, image] = ["script", "style", "img"].map(name => document.createElement(name));
        script.textContent = "window.owned = true";
        style.textContent = "body { display: none }";
        image.src = "https://example.org/picture.png";
        document.body.append(script, style);
        await fetch("https://example.org/").catch(() => 0);
        await new Promise(done => setTimeout(done, 100));
        return [...broken, String(window.owned)];
    }""")
    assert sorted(broken) == ["connect-src", "img-src", "script-src-elem", "style-src-elem", "undefined"]


# In a check: the picture of the reference, and whether a candidate shows the same one at this moment.
SAME = """() => {
    const data = [...document.querySelectorAll("canvas")].map(canvas => canvas.toDataURL());
    return [data[0], data.slice(1).includes(data[0])];
}"""


def to_a_check(page):
    """Goes on to the first attention check."""
    while page.evaluate("question().id") not in RIGHT:
        by_key(page, wanted(WISHES["touch"]))
    until(page, "clips.length === 5 && clips[1].canvas.isConnected")


def test_clips_play_in_step(visit):
    page, seen = visit(), set()
    to_a_check(page)
    for _ in range(12):
        picture, same = page.evaluate(SAME)
        assert same
        seen.add(picture)
        page.wait_for_timeout(60)
    assert len(seen) > 3
    page.keyboard.press("p")
    stopped = page.evaluate(SAME)
    page.wait_for_timeout(250)
    assert page.evaluate(SAME) == stopped and page.inner_text("#play") == "Play"


def test_reduced_motion_is_respected(visit):
    page = visit(reduced_motion="reduce")
    for _ in range(2):                                              # every question begins at rest
        still = page.evaluate(SAME)
        page.wait_for_timeout(250)
        assert page.evaluate(SAME) == still and page.inner_text("#play") == "Play"
        page.click("#step")
        assert page.evaluate(SAME) != still
        page.click("#play")
        page.wait_for_timeout(250)
        assert page.evaluate("frame") > 2 and page.inner_text("#play") == "Pause"
        by_key(page, wanted(WISHES["touch"]))
        until(page, "clips[1].canvas.isConnected")


@pytest.mark.parametrize("blocked", ["throw new DOMException('no', 'SecurityError')", "return undefined"])
def test_a_browser_that_keeps_nothing_still_votes(visit, tmp_path, blocked):
    page = visit(f"Object.defineProperty(window, 'localStorage', {{ get() {{ {blocked} }} }})")
    assert page.is_visible("#forgetful")
    for _ in range(7):
        by_key(page, wanted(WISHES["touch"]))
    votes, notes = eval_mi.read_votes([download(page, tmp_path)], BALLOT)
    assert len(votes) == 4 and notes == [] and page.trouble == []


def test_two_tabs_do_not_lose_each_others_answers(visit, ballot):
    """The tab that another one has overtaken says so, writes nothing, and goes on where that one was."""
    first = visit()
    by_key(first, wanted(WISHES["touch"]))
    second = opened(first.context.new_page(), ballot)
    assert second.inner_text("#progress") == "1 of 6"
    for _ in range(2):
        by_key(second, wanted(WISHES["touch"]))
    newest = second.evaluate("localStorage.getItem(memory)")
    for tries in range(2):
        first.keyboard.press(str(1 + tries))
        assert first.is_visible("#elsewhere")
        assert not first.is_visible("#vote") and not first.is_visible("#end")
        first.keyboard.press("Enter")
    assert second.evaluate("localStorage.getItem(memory)") == newest
    by_key(second, wanted(WISHES["touch"]))
    assert second.inner_text("#progress") == "4 of 6" and not second.is_visible("#elsewhere")
    first.reload()
    until(first, "clips.length > 0")
    assert first.inner_text("#progress") == "4 of 6" and first.trouble == second.trouble == []


def test_without_scripts_the_page_says_what_it_needs(browser, ballot):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(ballot.as_uri())
    assert page.is_visible("text=needs a browser that runs scripts")
    assert not page.is_visible("#vote") and not page.is_visible("#end") and not page.is_visible("#elsewhere")
    context.close()


def test_a_printed_report_shows_a_frame_of_every_clip(browser, tmp_path):
    """Browsers leave background pictures out of what is printed, unless a page asks for them."""
    page = (mini_mi.HERE / "data" / "report.html").read_text(encoding="utf-8")
    rng, clips = np.random.default_rng(0), []
    for label in ("reference", "full", "no-mqk"):
        frames = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
        clips.append(eval_mi.moving_clip(frames, label))
    words = dict.fromkeys(re.findall(r"[$][{](\w+)[}]", page), "")
    filled = string.Template(page).substitute(words, clips="".join(clips))
    (tmp_path / "report.html").write_text(filled, encoding="utf-8")
    context = browser.new_context()
    shown = context.new_page()
    shown.goto((tmp_path / "report.html").as_uri())
    printed = shown.pdf(print_background=False)
    context.close()
    assert printed.count(b"/Subtype /Image") >= len(clips)


@pytest.mark.parametrize("kept", ["{", "[]", "3", '{"order": ["example"]}', '{"order": 7}'])
def test_damaged_memory_begins_anew(visit, kept):
    page = visit(f"localStorage.setItem('ballot-{RUN}', {kept!r})")
    assert page.inner_text("#progress") == "First an example" and page.trouble == []


def test_the_text_can_be_copied_and_focus_is_where_it_helps(visit):
    page = visit()
    assert page.evaluate("document.activeElement.id") == "heading"
    # Tab to a clip and choose it by Enter; Enter once more goes on, and Tab reaches all controls.
    place = place_of(page, wanted(WISHES["touch"]))
    for _ in range(place + 1):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#candidates button").nth(place).get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    assert page.inner_text("#progress") == "1 of 6"
    for _ in range(6):
        by_key(page, wanted(WISHES["touch"]))
    page.click("#copy")
    assert page.inner_text("#said") == "Copied."
    page.evaluate("document.getElementById('text').readOnly = false")
    page.evaluate("document.getElementById('text').value = ''")
    page.locator("#text").focus()
    page.keyboard.press("Control+V")
    assert page.input_value("#text").startswith(",".join(eval_mi.VOTE_FIELDS) + "\n")


@pytest.mark.parametrize("scheme, paper", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 26, 33)")])
def test_the_theme_is_that_of_the_report(visit, scheme, paper):
    page = visit(color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper

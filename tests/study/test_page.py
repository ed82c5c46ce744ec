"""The page of the study: what it says, and, in Chromium, what it shows and does when it is clicked."""

import json
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from moe.study.measurement import Axis, Measurement
from moe.study.metrics.load import consecutive_repetition
from moe.study.metrics.pairs import co_activation, cross_layer_transitions, expert_paths
from moe.study.metrics.specialisation import domain_information, domain_specialisation, token_dependence
from moe.study.metrics.stability import saturation
from moe.study.page import write_page
from moe.study.page.findings import findings
from moe.study.page.viewer import packed_tokens

pytest.importorskip("plotly")

N_EXPERTS, N_LAYERS, N_DOMAINS, TOP_K = 16, 4, 6, 2
STEPS = range(100, 2001, 100)
LARGEST_PAGE = 6_000_000
VOCABULARY = (" the", "def", "\n", "<b>", "&amp;", "</script>", "\ufffd", "'", *(f" word{n}" for n in range(32)))


def example(records, strength, step, n_sequences=60, length=100, seed=0):
    """16 experts, 4 layers, 6 domains: the later the layer, the more a domain decides, and not without ``strength``."""
    generator = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(n_sequences), length)
    domain = sequence % N_DOMAINS
    token_id = generator.integers(0, len(VOCABULARY), len(sequence))
    wishes = np.random.default_rng(1).normal(size=(2, N_LAYERS, 64, N_EXPERTS))
    selected = []
    for layer in range(N_LAYERS):
        logits = 1.5 * wishes[0, layer][token_id] + 0.5 * layer * wishes[1, layer][domain]
        logits = strength * logits + generator.normal(size=logits.shape)
        selected.append(np.argsort(-logits, axis=1)[:, :TOP_K])
    return replace(
        records.of(selected, N_EXPERTS, token_id=token_id, sequence=sequence, domain=domain, step=step),
        vocabulary=VOCABULARY,
        domains=("python", "cpp", "docs", "speech", "legal", "<i>dialogue</i>"),
        loss=generator.gamma(2, 1.2, len(sequence)).astype(np.float32),
    )


def labelled(name, labels):
    return Axis(name, tuple(str(label) for label in labels))


def interventions():
    axes = (
        labelled("layer", range(N_LAYERS)),
        labelled("expert", range(N_EXPERTS)),
        labelled("domain", range(N_DOMAINS)),
    )
    rise = np.random.default_rng(0).normal(0, 0.01, (N_LAYERS, N_EXPERTS, N_DOMAINS))
    rise[2, 5, 3] = 0.5
    none = np.zeros(())
    delta = Measurement(
        "delta_loss", "Loss without", "Read.", rise, axes, "nats", none, none, np.full(rise.shape, 0.01)
    )
    ks = labelled("k", range(1, 17))
    by_k = Measurement("loss_by_k", "Loss by k", "Read.", 2.3 + 0.02 * abs(np.arange(1.0, 17.0) - 3), (ks,), "nats")
    return delta, by_k


def measured(record, over_training):
    found = {
        metric.__name__: metric(record)
        for metric in (
            domain_specialisation,
            domain_information,
            token_dependence,
            co_activation,
            consecutive_repetition,
            expert_paths,
        )
    }
    return found | {"saturation": saturation(over_training)}


@pytest.fixture(scope="module")
def final(records):
    return example(records, 1.0, 2000)


@pytest.fixture(scope="module")
def page(records, final, tmp_path_factory):
    over_training = [example(records, step / 2000, step, n_sequences=12) for step in STEPS]
    delta_loss, loss_by_k = interventions()
    return write_page(
        tmp_path_factory.mktemp("study") / "page.html",
        final=final,
        over_training=over_training,
        measurements=measured(final, over_training),
        delta_loss=delta_loss,
        loss_by_k=loss_by_k,
        facts={"run": "runs/example", "configuration": "4 layers & 16 experts", "bits per byte": 1.2345678},
    )


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


# --------------------------------------------------------------------------------------------------------------- file


def test_the_page_is_small_and_asks_for_nothing(page):
    assert page.stat().st_size < LARGEST_PAGE
    text = page.read_text()
    # Everything but the packed library, which is one line of base64.
    assert not re.search(r"""(src|href)=["'](https?:)?//|@import|url\(""", text)


def test_the_sections_come_in_order(page):
    sections = re.findall(r'<section id="([a-z-]+)">', page.read_text())
    assert sections == [
        *("summary", "load", "saturation", "domains", "co-activation", "paths", "knockout", "tokens", "text")
    ]


def test_facts_are_spelled_and_escaped(page):
    text = page.read_text()
    assert "4 layers &amp; 16 experts" in text
    assert "<b>1.235</b><span>bits per byte</span>" in text
    assert "&lt;i&gt;dialogue&lt;/i&gt;" in text
    assert "<i>dialogue" not in text


def test_text_that_ends_scripts_does_not_end_the_data(page):
    # json.loads in data_of would fail if "</script>" of the vocabulary stood in it.
    assert "</script>" in data_of(page)["tokens"]["texts"]


def test_every_picture_of_the_sections_has_its_data(page):
    named = set(re.findall(r'data-figure="([^"]+)"', page.read_text()))
    chosen = {f"delta_loss/{layer}" for layer in range(N_LAYERS)}
    assert set(data_of(page)["figures"]) == named | chosen
    assert named == {
        *("load", "saturation", "domain_specialisation", "domain_information", "co_activation", "flow"),
        *("expert_paths", "delta_loss/0", "loss_by_k"),
    }


def test_bars_of_a_sample_are_told_from_the_findings(page, records, final, tmp_path):
    # 12 sequences of 100 tokens during training, and 60 of them for all else.
    assert "These are the 1,200 held-out tokens" in page.read_text()
    assert "is of 6,000 tokens" in page.read_text()
    alone = write_page(tmp_path / "page.html", final=final)
    assert "These are the" not in alone.read_text()


def test_what_is_missing_is_said_in_a_line(records, tmp_path):
    text = write_page(tmp_path / "page.html", final=records.uniform(200, 4, 1)).read_text()
    for line in (
        "only one step is recorded",
        "Saturation: it needs records of several steps",
        "Domain specialisation: it was not measured",
        "Co activation: it was not measured",
        "there is only one mixture layer",
        "no expert was knocked out",
        "k was not changed",
    ):
        assert line in text
    assert "Text, coloured by expert" in text


def test_a_record_without_tokens_makes_a_page(records, tmp_path):
    empty = records.of([np.zeros((0, 2), np.int32)], 4, domains=("a",))
    text = write_page(tmp_path / "page.html", final=empty).read_text()
    assert "the record has no routed tokens" in text


def test_many_experts_fit(records, tmp_path):
    # 64 experts of 8 in 16 layers: co-activation alone has 65,536 cells.
    record = records.uniform(4000, 64, 8, n_layers=16)
    measurements = {"co_activation": co_activation(record)}
    page = write_page(tmp_path / "page.html", final=record, measurements=measurements)
    assert page.stat().st_size < LARGEST_PAGE
    assert re.search(r"Shown: layers 0, [0-9, ]+ of 16", page.read_text())


# ------------------------------------------------------------------------------------------------------------- viewer


def numbers(packed):
    import base64

    kind = {"Uint8": "u1", "Uint16": "<u2", "Uint32": "<u4"}[packed["type"]]
    return np.frombuffer(base64.b64decode(packed["data"]), kind)


def test_packed_tokens_by_hand(records):
    record = records.of(
        # Token 1 holds one expert, token 2 lost its second for lack of room; experts go up to 299.
        [[[0, 299], [7, -1], [3, 4]]],
        300,
        weights=[[[0.75, 0.25], [1.0, 0.0], [1.0, 0.0]]],
        dropped=[[[False, False], [False, False], [False, True]]],
        domain=[1, 0, 1],
        sequence=[0, 1, 2],
        token_id=[5, 5, 6],
        loss=[1.5, 0.25, 100.0],
    )
    packed = packed_tokens(record)
    # Domain 0 first: rows 1, then 0 and 2; each is of another sequence than the one before.
    assert [domain["count"] for domain in packed["domains"]] == [1, 2]
    assert packed["starts"] == [0, 1, 2]
    assert packed["texts"] == ["<5>", "<6>"]
    assert numbers(packed["text"]).tolist() == [0, 0, 1]
    # Thousandths of a nat, up to 65.535.
    assert numbers(packed["loss"]).tolist() == [250, 1500, 65_535]
    (layer,) = packed["layers"]
    assert numbers(layer["experts"]).tolist() == [7, layer["empty"], 0, 299, 3, 4]
    weights = (numbers(layer["weights"]).astype(int) - layer["weight_zero"]) * layer["weight_step"]
    assert weights == pytest.approx([1, 0, 0.75, 0.25, 1, 0], abs=1e-4)
    assert numbers(layer["dropped"]).tolist() == [0, 0, 0, 0, 0, 1]


def test_no_more_tokens_than_wanted(records):
    record = records.planted(2, 2, 1, sequences_per_domain=4, length=50)
    assert [domain["count"] for domain in packed_tokens(record, 120)["domains"]] == [120, 120]


# ----------------------------------------------------------------------------------------------------------- findings


def all_findings(record):
    flows = [cross_layer_transitions(record, one, one + 1) for one in range(len(record.layers) - 1)]
    measurements = {
        metric.__name__: metric(record)
        for metric in (domain_specialisation, domain_information, token_dependence, consecutive_repetition)
    }
    if record.layers[0].top_k > 1:
        measurements["co_activation"] = co_activation(record)
    return findings(record, measurements, flows)


@pytest.mark.parametrize("seed", range(3))
def test_routing_that_knows_nothing_gives_no_finding(records, seed):
    generator = np.random.default_rng(seed)
    sequence = np.arange(6000) // 50
    record = records.uniform(
        6000,
        8,
        2,
        n_layers=2,
        seed=seed,
        sequence=sequence,
        domain=sequence % 3,
        token_id=generator.integers(0, 40, 6000),
    )
    sentences = all_findings(record)
    assert len(sentences) == 7
    assert "of the 16 experts in all layers none gets less" in sentences[0]
    assert "domain specialisation is no more than chance" in sentences[1]
    # Of the domain, of it with the token known, and of the token in two layers.
    assert sentences[2].count("which is no more than chance") == 2
    assert sentences[3].count("which is no more than chance") == 2
    assert "which is no more than chance" in sentences[4]
    assert sentences[5] == "No two experts are chosen together more often than their loads alone would have it."
    assert sentences[6] == "No way from layer to layer is taken more often than chance."


def test_planted_domains_are_found(records):
    # Domain a owns experts 0 and 1, b 2 and 3, c 4 and 5; each expert gets half of a domain's tokens, a sixth of all.
    sentences = all_findings(records.planted(3, 2, 1, n_layers=2))
    assert re.search(r"ayer \d sends [abc] to experts \d and \d: 3.\d and [23].\d times their shares", sentences[1])
    assert "no more than chance" not in sentences[2]


def test_saturation_is_told_at_a_tenth_of_training(records):
    # Of two tokens with one of four experts each, the first has its last expert from step 10 on.
    steps = [
        records.of([[[first], [second]]], 4, step=step) for first, second, step in ((2, 2, 5), (0, 2, 10), (0, 1, 100))
    ]
    told = findings(steps[-1], {"saturation": saturation(steps)})[1]
    assert told.startswith("At step 10 of 100, 50 % of the experts that tokens had in the end were chosen")


def test_the_last_step_is_not_told_to_agree_with_itself(records):
    # With records at the start and the end alone, the first from a tenth of training on is the last.
    steps = [records.of([[[first]]], 4, step=step) for first, step in ((2, 0), (0, 100))]
    assert len(findings(steps[-1], {"saturation": saturation(steps)})) == 1


def test_domains_cannot_be_told_from_few_sequences(records):
    # One sequence a domain: shuffled domains are other names of the same groups, which tell as much of the expert.
    sequence = np.arange(300) // 100
    record = records.of([sequence[:, None]], 3, sequence=sequence, domain=sequence)
    measured = {
        "domain_specialisation": domain_specialisation(record),
        "domain_information": domain_information(record),
    }
    assert findings(record, measured)[1:] == [
        "Whether domains have experts of their own cannot be told from 3 sequences: it takes 27 for any routing to "
        "differ from shuffled domains."
    ]


def test_an_expert_of_one_domain_alone_is_as_many_deviations_above_its_null_as_sequences_allow(records):
    # 40 sequences of 4 domains, each with an expert of its own: √39 deviations.
    sequence = np.arange(400) // 10
    record = records.of([(sequence % 4)[:, None]], 4, sequence=sequence, domain=sequence % 4)
    measured = domain_specialisation(record, permutations=2000)
    above = (measured.values - measured.null) / measured.null_std
    assert above[0].diagonal() == pytest.approx(np.full(4, 39**0.5), rel=0.1)


def test_tokens_of_a_sequence_that_resemble_each_other_are_no_way_between_layers(records):
    # Each of 300 sequences prefers an expert in either layer, independently: of 15,000 tokens 64 ways would stand out.
    generator = np.random.default_rng(0)
    sequence = np.arange(15000) // 50
    layers = [
        np.where(
            generator.random(15000) < 0.5, generator.integers(0, 8, 300)[sequence], generator.integers(0, 8, 15000)
        )[:, None]
        for _ in range(2)
    ]
    record = records.of(layers, 8, sequence=sequence)
    told = findings(record, {}, [cross_layer_transitions(record, 0, 1)])[1]
    assert told == "No way from layer to layer is taken more often than chance."


def test_half_of_the_experts_dead(records):
    # Random routing to 4 of 8 experts: the busiest has about twice its share.
    (sentence,) = findings(records.half_dead(8000, 8, 1), {})
    assert re.search(r"gets 2\.\d\d times its fair share", sentence)
    assert "of the 8 experts in all layers 4 get less than a tenth" in sentence


def test_the_expert_that_matters_is_named(records):
    delta_loss, loss_by_k = interventions()
    sentences = findings(records.uniform(100, 4, 1), {}, (), delta_loss, loss_by_k)
    assert "Without expert 5 of layer 2 the loss on 3 rises by 0.500 nats a token" in sentences[1]
    assert sentences[2] == "Loss is lowest with 3 experts a token: 2.300 nats (with 1: 2.340, with 16: 2.560)."


def test_a_domain_without_a_loss_does_not_hide_the_best_k(records):
    _, by_k = interventions()
    losses = np.stack([by_k.values, np.full(16, np.nan)], axis=1)
    by_domain = replace(by_k, values=losses, axes=(*by_k.axes, labelled("domain", range(2))))
    sentences = findings(records.uniform(100, 4, 1), {}, (), None, by_domain)
    assert "Loss is lowest with 3 experts a token: 2.300 nats" in sentences[1]


def test_an_absence_within_its_error_is_no_finding(records):
    delta_loss, _ = interventions()
    vague = replace(delta_loss, null_std=np.full(delta_loss.values.shape, 0.2))
    sentences = findings(records.uniform(100, 4, 1), {}, (), vague)
    assert sentences[1] == "No expert's absence raises the loss of a domain by more than chance."


# ------------------------------------------------------------------------------------------------------------ browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1200,900"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait_for(driver, condition, seconds=30):
    """Wait until the script's ``condition`` is true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := driver.execute_script(f"return {condition}"):
            return found
        time.sleep(0.02)
    raise AssertionError(f"never became true: {condition}")


@pytest.fixture
def opened(browser, page):
    """The page, opened anew in light colours; figures are drawn later."""
    colours(browser, "light")
    browser.get(page.as_uri())
    browser.execute_script("localStorage.clear()")
    return browser


def colours(driver, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def drawn(driver, name):
    """Scroll to a figure and wait for it."""
    place = f"document.querySelector('[data-figure=\"{name}\"]')"
    driver.execute_script(f"{place}.scrollIntoView()")
    wait_for(driver, f"{place}.dataset.drawn && {place}.querySelector('.main-svg') !== null")
    return place


def choose(driver, box, value):
    driver.execute_script(
        f"const box = document.querySelector('{box}'); box.value = '{value}';"
        "box.dispatchEvent(new Event('change', {bubbles: true}))"
    )


def token_colours(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#text-pane span')].map((span) => span.style.backgroundColor)"
    )


@pytest.mark.browser
def test_it_opens_without_errors_and_without_requests(opened, page, record_property):
    for name in data_of(page)["figures"]:
        if "/" not in name:
            drawn(opened, name)
    errors = [entry for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    # The browser asks for its own pages too.
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent" and event["params"]["documentURL"] == page.as_uri()
    }
    # The icon is an empty data address.
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
    timing = opened.execute_script("return performance.getEntriesByType('navigation')[0].domInteractive")
    record_property("milliseconds until the page can be used", timing)
    assert timing < 10_000


@pytest.mark.browser
def test_the_slider_changes_the_bars_and_the_step(opened):
    place = drawn(opened, "load")
    bars = f"{place}.data.filter((trace) => trace.type === 'bar').map((trace) => Array.from(trace.y))"
    before = opened.execute_script(f"return {bars}")
    slider = opened.find_element("id", "step")
    slider.send_keys("\ue012" * 19)  # the left arrow
    assert opened.find_element("id", "step-shown").text == "100"
    after = opened.execute_script(f"return {bars}")
    assert len(after) == N_LAYERS
    assert before != after
    assert [sum(layer) for layer in after] == pytest.approx([1] * N_LAYERS, abs=1e-3)
    # At step 100 routing is nearly random, at the end it is not.
    assert max(after[3]) < max(before[3])


@pytest.mark.browser
def test_a_click_on_a_token_shows_all_layers_and_outlines_its_expert(opened, final):
    token = opened.find_element("css selector", "#text-pane span[data-token='3']")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    token.click()
    rows = opened.find_elements("css selector", "#detail tbody tr")
    assert len(rows) == N_LAYERS * TOP_K
    shown = [int(row.find_elements("css selector", "td")[0].text) for row in rows]
    # The first domain's tokens are the first rows of the record.
    assert shown == [int(expert) for layer in final.layers for expert in layer.selected[3]]
    expert = str(final.layers[0].selected[3, 0])
    same = opened.execute_script(
        "return [...document.querySelectorAll('#text-pane span.same')].map((span) => span.dataset.expert)"
    )
    assert set(same) == {expert}
    assert f"Outlined: {len(same)} other tokens of expert {expert}." in opened.find_element("id", "detail").text


@pytest.mark.browser
def test_layer_choice_and_domain_recolour_the_text(opened):
    first = token_colours(opened)
    assert len(first) == 1000
    choose(opened, "#viewer-layer", 3)
    deeper = token_colours(opened)
    choose(opened, "#viewer-rank", 1)
    second = token_colours(opened)
    assert first != deeper != second
    assert len(set(first)) == N_EXPERTS
    choose(opened, "#viewer-domain", 1)
    assert token_colours(opened) != second


@pytest.mark.browser
def test_hovering_shows_weight_and_loss(opened, final):
    from selenium.webdriver import ActionChains

    token = opened.find_element("css selector", "#text-pane span[data-token='8']")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(opened).move_to_element(token).perform()
    said = opened.find_element("id", "tip").text
    assert said.endswith(f"expert {final.layers[0].selected[8, 0]}, weight 0.50, loss {final.loss[8]:.2f}")


@pytest.mark.browser
def test_the_text_can_be_read_with_the_keyboard(opened):
    opened.execute_script("document.querySelector('#text-pane span').focus()")
    opened.switch_to.active_element.send_keys("\ue014")  # the right arrow
    opened.switch_to.active_element.send_keys("\ue014")
    opened.switch_to.active_element.send_keys("\ue007")  # enter
    assert opened.execute_script("return document.querySelector('#text-pane span.here').dataset.token") == "2"
    assert opened.find_elements("css selector", "#detail tbody tr")


@pytest.mark.browser
def test_the_legend_lights_one_expert(opened):
    opened.execute_script("document.querySelectorAll('#legend button')[7].click()")
    lit = opened.execute_script(
        "return [...document.querySelectorAll('#text-pane span.lit')].map((span) => span.dataset.expert)"
    )
    assert set(lit) == {"7"}


@pytest.mark.browser
def test_loss_change_by_layer(opened):
    drawn(opened, "delta_loss/0")
    picture = "document.querySelector('[data-chosen=\"delta_loss\"]')"
    shown = f"[{picture}.layout.coloraxis.cmax, Array.from({picture}.calcdata[0][0].z, (row) => Array.from(row))]"
    limit, first = opened.execute_script(f"return {shown}")
    choose(opened, "select[data-chooses=delta_loss]", "delta_loss/2")
    same_limit, second = opened.execute_script(f"return {shown}")
    assert first != second
    # Rows are domains, columns experts; the colours of all layers are the same.
    assert second[3][5] == pytest.approx(0.5)
    assert limit == same_limit == pytest.approx(0.5)


@pytest.mark.browser
def test_typical_tokens_by_layer(opened):
    choose(opened, "select[data-shows=typical]", 2)
    shown = opened.execute_script(
        "return [...document.querySelectorAll('[data-table=typical]')].map((table) => table.hidden)"
    )
    assert shown == [True, True, False, True]


@pytest.mark.browser
def test_dark_and_light(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    place = drawn(opened, "domain_specialisation")
    neutral = f"{place}.layout.coloraxis.colorscale[2][1]"
    light = opened.execute_script(f"return [{ground}, {place}.layout.font.color, {neutral}]")
    colours(opened, "dark")
    dark = wait_for(opened, f"{ground} !== '{light[0]}' && [{ground}, {place}.layout.font.color, {neutral}]")
    assert all(one != other for one, other in zip(light, dark, strict=True))
    opened.find_element("id", "theme").click()
    assert opened.execute_script(f"return [{ground}, {place}.layout.font.color, {neutral}]") == light


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 800])
def test_nothing_is_wider_than_the_window(opened, page, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for name in data_of(page)["figures"]:
        if "/" not in name:
            drawn(opened, name)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width

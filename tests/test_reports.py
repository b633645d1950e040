"""Reports: each kind of error that was seen in real reports, in words of our own, and properties that hold for any text."""
import re
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.data.build import ImageRecord, StudyRecord, write_pack
from medvis.data.files import RejectCode
from medvis.data.sets.mimic import _LOCAL_MI_RULES
from medvis.data.reports import (LOVT_RULES, MGCA_RULES, ReportRules, check_report, count_headings, _filter_reports, find_words, normalise,
                                 parse_mimic_sections, parse_sections, report_sentences, _section_name, split_sentences, _unknown_headings)
from medvis.data.source import describe_pack

PIECES = st.sampled_from([
    "The lungs are clear", "no effusion", "1.5 cm", "2. ", "1. ", "3)", "Dr. ", "J. ", "approx. ", "e.g. ", "vs. ", "a.m. ", "p.m.", "___", "XXXX", ".", ". ",
    "..", "...", "?", "! ", "\n", "\n\n", "\r\n", "- ", "(a)", "\"", "”", "Größe", "肺野清晰。", "…", "T12.", "L4.L5", "&lt;", " ", "\t", "\u00a0", "FINDINGS: ", "\n IMPRESSION: "])
TEXTS = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=25).map("".join))


def solid(text: str) -> str:
    "The text without white space"
    return "".join(text.split())


# sentences, as they should come out; joined by a blank they must fall apart the same way
KINDS = {
    "decimals": ["A 1.5 cm nodule.", "It measured 1.2 x 0.9 cm.", "The tube ends 3.0 cm above the carina."],
    "unit before a full stop": ["The nodule measures 5 mm.", "No effusion.", "The line ends 4 cm. above the carina."],
    "numbered list": ["1. No pneumonia.", "2. Small effusion.", "3. Old rib fractures."],
    "item that begins with a measure": ["1. Clear lungs.", "2. 8mm nodule at the left base.", "3. 1.4 cm granuloma."],
    "bracketed numbers": ["1) No pneumonia.", "2) Large heart."],
    "abbreviations": ["Seen with Dr. Grey vs. prior.", "The tip lies approx. 2 cm deep, i.e. too deep, e.g. in the right main bronchus.", "St. Jude valve."],
    "time of day": ["Called at 9:15 a.m. by phone.", "Read at 3 p.m. on ___.", "Done at 4 a.m.", "The tube is new."],
    "initials": ["Findings were told to Dr. J. R. Grey by phone.", "No change."],
    "letter at the end": ["Known hepatitis C.", "Lungs are clear."],
    "blanks of MIMIC": ["Compared with ___.", "___ line is unchanged.", "Dr. ___ was called.", "___."],
    "blanks of Open-I": ["XXXX opacity.", "XXXX XXXX are normal.", "XXXX.", "Heart is normal."],
    "small start": ["lungs are clear.", "old rib fractures.", "heart is normal."],
    "stray full stops": ["No effusion. .", "Please call.", "Clear..", "Normal."],
    "ellipsis": ["Perhaps ... in the lingula.", "Unclear…", "Follow up."],
    "questions": ["Pneumonia?", "Yes!", "Treat."],
    "quotes and brackets": ["The heart is \"boot-shaped.\"", "(No effusion.)", "[Clear.]", "Done."],
    "vertebrae": ["Narrowing at L4.L5 and T12.", "No fracture."],
    "German": ["Kein Erguss, z.B. links.", "Ärztlich unauffällig.", "Größe normal."],
    "French": ["Cœur de taille normale.", "À gauche, épanchement."],
    "lost signs": ["Fever of 38.5? C today.", "He had 39?C and 0.8?103/?L cells.", "Zone 3?", "Clear."],
    "number of something": ["Rib no. 7 is broken.", "Stable."],
}


@pytest.mark.parametrize("kind", KINDS)
def test_sentences(kind):
    assert split_sentences(" ".join(KINDS[kind])) == KINDS[kind]


@pytest.mark.parametrize(("text", "sentences"), [
    ("The lungs are clear.No effusion.Heart is normal.", ["The lungs are clear.", "No effusion.", "Heart is normal."]),
    ("CLEAR LUNGS.NO EFFUSION.", ["CLEAR LUNGS.", "NO EFFUSION."]),
    ("1.No pneumonia.2.Large heart.", ["1.No pneumonia.", "2.Large heart."]),
    ("1. No pneumonia 2. Large heart 3. Old fractures", ["1. No pneumonia", "2. Large heart", "3. Old fractures"]),
    ("1. No pneumonia\n2. large heart", ["1. No pneumonia", "2. large heart"]),
    ("- No pneumonia\n- large heart", ["- No pneumonia", "- large heart"]),
    ("The heart\n is large.  The\n lungs are clear.", ["The heart is large.", "The lungs are clear."]),
    ("A fracture of rib\n 7. No effusion.", ["A fracture of rib 7.", "No effusion."]),
    ("Heart size\n\nLungs", ["Heart size", "Lungs"]),
    ("肺野清晰。心影正常。", ["肺野清晰。", "心影正常。"]),
    ("See www.example.org or a@b.org today.", ["See www.example.org or a@b.org today."]),
    ("...", ["..."]), ("1.", ["1."]), ("", []), (" \r\n\t", []),
])
def test_sentences_of(text, sentences):
    assert split_sentences(text) == sentences


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_nothing_is_lost(text):
    sentences = split_sentences(text)
    assert solid("".join(sentences)) == solid(text)
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in sentences)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_splitting_ends(text):
    "Splitting sentences again may cut a little more where context is gone, but a third pass changes nothing, and it never joins"
    def again(sentences):
        return [part for sentence in sentences for part in split_sentences(sentence)]
    once = split_sentences(text)
    twice = again(once)
    assert len(twice) >= len(once) and again(twice) == again(again(twice))


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from([ReportRules(), LOVT_RULES, MGCA_RULES]))
def test_any_text_gives_clean_sentences(text, rules):
    sentences, reason = check_report(text, rules)
    assert (reason is None or reason in RejectCode) and all(find_words(sentence, rules.count_punctuation) for sentence in sentences)
    assert all(body == body.strip() != "" for body in parse_sections(text).values())
    if rules.ascii_only:
        assert "".join(sentences).isascii()


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.booleans())
def test_words_are_where_they_are_said_to_be(sentence, punctuation):
    spans = find_words(sentence, punctuation)
    assert all(0 <= a < b <= len(sentence) and not re.search(r"\s", sentence[a:b]) for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:], strict=False))
    if punctuation:
        shown, whole = ("".join(c for c in one if unicodedata.category(c) != "Cf") for one in ("".join(sentence[a:b] for a, b in spans), sentence))
        assert solid(shown) == solid(whole)      # all but format characters, which no word needs


MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old with cough
 
 FINDINGS: 
 
 Lungs are clear.  NOTE the following: no change.
 
 IMPRESSION: 
 
 No acute process.
"""


@pytest.mark.parametrize("damage", [str, lambda t: t.replace("\n", "\r\n"), lambda t: t.replace("\n", "\r"), lambda t: "\ufeff" + t, str.strip,
                                    lambda t: t.strip().split("\n", 1)[1].lstrip()])
def test_mimic_sections(damage):
    sections = parse_sections(damage(MIMIC))
    assert sections["findings"] == "Lungs are clear.  NOTE the following: no change." and sections["impression"] == "No acute process."
    assert sections["indication"] == "___ year old with cough" and sections["examination"] == "CHEST (PA AND LAT)"


@pytest.mark.parametrize(("text", "sections"), [
    ("FINDINGS:\nClear.\n\nIMPRESSION:\nNormal.", {"findings": "Clear.", "impression": "Normal."}),
    ("Findings: Clear.\nConclusion: Normal.", {"findings": "Clear.", "impression": "Normal."}),
    ("Some title\nFINDINGS: Clear. Note: old.\nNOTE: new.", {"preamble": "Some title", "findings": "Clear. Note: old.\nNOTE: new."}),
    ("INDICATION: Cough. FINDINGS: Clear. IMPRESSION: Normal.", {"indication": "Cough.", "findings": "Clear.", "impression": "Normal."}),
    ("FINDINGS: \nIMPRESSION: Normal.", {"impression": "Normal."}),
    ("FINDINGS:\nIMPRESSION:\n", {}),
    ("x\n FINDINGS AND IMPRESSION: Clear.", {"preamble": "x", "impression": "Clear."}),
    ("x\n IMPRSSION: Clear.", {"preamble": "x", "impression": "Clear."}),
    ("x\n FINDINGS: Old.\n FINDINGS: New.", {"preamble": "x", "findings": "Old.\n \nNew."}),
    ("x\n FINDINGS: Old.\n FINDINGS: \n \n", {"preamble": "x", "findings": "Old."}),
    ("x\n PORTABLE CHEST: Clear.", {"preamble": "x", "findings": "Clear."}),
    ("x\n HISTORY: Cough.\n \n Lungs clear.\n \n Heart normal.", {"preamble": "x", "history": "Cough.", "last_paragraph": "Lungs clear.\n \n Heart normal."}),
    ("Lungs are clear; findings: none.", {"full report": "Lungs are clear; findings: none."}),
])
def test_sections_of(text, sections):
    assert parse_sections(text) == sections


def test_mimic_rule_is_strict():
    "Where MIMIC's rule finds headings, other spellings of headings are text"
    text = "x\n FINDINGS: Clear.\n Impression: in the text.\n IMPRESSION: Normal."
    assert parse_mimic_sections(text) == {"preamble": "x", "findings": "Clear.\n Impression: in the text.", "impression": "Normal."}
    assert parse_sections(text) == {"preamble": "x", "findings": "Clear.", "impression": "in the text.\n \nNormal."}
    assert parse_sections("x\n FINDINGS: a\n lower case: b\n CAPS WITH 2 DIGITS: c")["findings"] == "a\n lower case: b\n CAPS WITH 2 DIGITS: c"


def test_headings():
    assert [_section_name(h) for h in ("REASON FOR EXAMINATION", "CLINICAL HISTORY", "WETREAD", "FINDNGS", "PA AND LATERAL VIEWS OF THE CHEST",
                                      "IMPRESSION AND PLAN", "DOSE")] == ["indication", "history", "wet read", "findings", "findings", "impression", "dose"]


def test_rules_differ_as_published():
    text = "x\n FINDINGS: 1. A 1.5 cm nodule. Clear.\n IMPRESSION: Größe normal."
    assert report_sentences(text) == ["A 1.5 cm nodule.", "Clear.", "Größe normal."]
    assert report_sentences(text, MGCA_RULES) == ["Gre normal", "5 cm nodule"]     # "A" and "Clear" are single words
    assert report_sentences("Nothing has a heading here.", LOVT_RULES) == []
    assert report_sentences("Nothing has a heading here.") == ["Nothing has a heading here."]


def test_filter_counts_every_report():
    texts = ["FINDINGS: Normal chest.", "", None, "IMPRESSION: ___.", "x\n COMPARISON: None.\n FINDINGS: The lungs are clear."]
    for rules, kept in ((ReportRules(), 1), (LOVT_RULES, 2), (MGCA_RULES, 1)):
        sentences, counts = _filter_reports(texts, rules)
        assert counts["kept"] == kept == sum(s is not None for s in sentences) and sum(counts.values()) == len(texts)


def test_unknown_splitter():
    with pytest.raises(ValueError, match="unknown splitter 'nltk'; choose from medvis, full stop"):
        check_report("Clear.", ReportRules(splitter="nltk"))


def test_unknown_headings_rule():
    with pytest.raises(ValueError, match="unknown headings 'all'; choose from medvis, mit-lcp"):
        check_report("Clear.", ReportRules(headings="all"))


BODY = {"indication": "cough.", "findings": "Lungs are clear.", "impression": "No acute disease."}
LAYOUTS = {
    "no indentation": "INDICATION: {}\nFINDINGS: {}\nIMPRESSION: {}", "one of them indented": "INDICATION: {}\nFINDINGS: {}\n IMPRESSION: {}",
    "deep and tabs": "   INDICATION: {}\n\t\tFINDINGS: {}\n\u00a0 IMPRESSION: {}", "small letters": "indication: {}\nfindings: {}\nimpression: {}",
    "plural": "INDICATIONS: {}\nFINDING(S): {}\nIMPRESSIONS: {}", "brackets": "INDICATION [ED]: {}\nFINDINGS (CHEST): {}\nIMPRESSION (PRELIMINARY): {}",
    "joined": "CLINICAL INDICATION/HISTORY: {}\nFINDINGS: {}\nIMPRESSION AND RECOMMENDATION(S): {}", "plan": "INDICATION: {}\nFINDINGS: {}\nIMPRESSION & PLAN: {}",
    "bold": "**INDICATION:** {}\n\n**Findings**: {}\n\n__IMPRESSION:__ {}", "Markdown": "## Indication\n{}\n### Findings\n{}\n## Impression\n{}",
    "dash": "INDICATION - {}\nFINDINGS – {}\nIMPRESSION -- {}", "alone": "INDICATION\n{}\n\nFINDINGS\n{}\n\nIMPRESSION\n{}", "wide colon": "INDICATION：{}\nFINDINGS：{}\nIMPRESSION ： {}",
    "underlined": "Indication\n=====\n{}\nFindings\n-----\n{}\nImpression\n-----\n{}", "one line": "INDICATION: {} FINDINGS: {} IMPRESSION: {}", "no blank": "INDICATION:{}FINDINGS:{}IMPRESSION:{}",
    "numbered": "1. INDICATION: {}\n2. FINDINGS: {}\n3. IMPRESSION: {}", "list": "- Indication: {}\n- Findings: {}\n- Impression: {}", "square": "[INDICATION]\n{}\n[FINDINGS]\n{}\n[IMPRESSION]\n{}",
    "longer": "INDICATION FOR STUDY: {}\nFINDINGS OF THE CHEST: {}\nFINAL IMPRESSION: {}", "old Mac": "INDICATION: {}\rFINDINGS: {}\rIMPRESSION: {}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_headings(layout):
    text = LAYOUTS[layout].format(*BODY.values())
    assert parse_sections(text) == BODY
    assert report_sentences(text) == list(BODY.values())[1:]


def test_sub_headings_stay_below_findings():
    text = "FINAL REPORT\n EXAMINATION:  CHEST\n \n FINDINGS:\n \n LUNGS: Clear of consolidation.\n LINES AND TUBES: None.\n \n IMPRESSION:\n \n No acute disease.\n"
    assert parse_sections(text)["findings"] == "LUNGS: Clear of consolidation.\n LINES AND TUBES: None."
    assert parse_sections(text.replace("\n ", "\n"))["findings"] == "LUNGS: Clear of consolidation.\nLINES AND TUBES: None."
    assert report_sentences(text) == ["LUNGS: Clear of consolidation.", "LINES AND TUBES: None.", "No acute disease."]
    for rules in (LOVT_RULES, MGCA_RULES, _LOCAL_MI_RULES):      # as published: a section each
        assert rules.headings == "mit-lcp" and len(report_sentences(text, rules)) == 1
    assert list(parse_mimic_sections(text)) == ["preamble", "examination", "lungs", "lines and tubes", "impression"]


@pytest.mark.parametrize(("text", "sections"), [
    (" ADDENDUM:  A nodule.  \n \n FINAL REPORT\n FINDINGS: Old.\n \n IMPRESSION: Small.", {"addendum": "A nodule.", "preamble": "FINAL REPORT", "findings": "Old.", "impression": "Small."}),
    ("FINDINGS: Old.\nIMPRESSION: Small.\nADDENDUM #1: A nodule.\nIMPRESSION: New.", {"findings": "Old.", "impression": "Small.", "addendum": "A nodule.\nIMPRESSION: New."}),
    ("ADDENDUM: A nodule.\nIMPRESSION: New.\nFINDINGS: Old.\nIMPRESSION: Small.", {"addendum": "A nodule.\nIMPRESSION: New.", "findings": "Old.", "impression": "Small."}),
    ("ADDENDUM: A nodule.\nFINDINGS: Old.\nIMPRESSION: Small.", {"addendum": "A nodule.", "findings": "Old.", "impression": "Small."}),
    ("FINDINGS: Old.\nADDENDUM: One.\nADDENDUM: Two.", {"findings": "Old.", "addendum": "One.\n \nTwo."}),
    ("EXAM: CHEST\nFINDINGS: a.\nIMPRESSION: b.\nEXAM: ABDOMEN\nFINDINGS: c.\nIMPRESSION: d.",
     {"examination": "CHEST\n \nABDOMEN", "findings": "a.\n \nc.", "impression": "b.\n \nd."}),
])
def test_no_section_replaces_another(text, sections):
    assert parse_sections(text) == sections


def test_only_recurring_capitals_are_told():
    "What a manifest holds: short capital headings of several reports, never a name that stands in one"
    texts = ["INDICATION: x\nLUNGS: Clear.\nNot a heading: y\nIMPRESSION: z"] * 5 + ["SMITH: seen", None, "A VERY LONG HEADING THAT IS MORE THAN FORTY CHARACTERS: x"]
    assert count_headings(texts) == {"LUNGS": 5, "(seldom)": 1}
    assert _unknown_headings("FINDINGS: a\nCHEST PA: b\nIMPRSSION: c") == []


def test_a_pack_tells_what_was_not_understood(tmp_path):
    def read(number):
        text = f"FINDINGS: The lungs are clear.\n{'LUNGS' if number < 6 else 'SMITH'}: All is well here."
        image = ImageRecord(str(number), np.full((8, 8), number, np.uint8))
        return StudyRecord(study_id=str(number), patient_id=str(number), split="train", images=[image], report=text)
    pack = write_pack(tmp_path / "pack", range(7), read, 8, {"kind": "invented"})
    assert pack.manifest["headings"] == {"LUNGS": 6, "(seldom)": 1} and "SMITH" not in (tmp_path / "pack" / "manifest.json").read_text()
    assert "headings not understood, and in how many reports: LUNGS 6, (seldom) 1" in describe_pack(pack)


@pytest.mark.parametrize("bullet", ["–", "—", "•", "*", "-", "‣", "◆", "– ", "• ", "* ", "1. ", "1)", "(1) "])
def test_one_sentence_a_bullet(bullet):
    items = [bullet.replace("1", str(number)) + text for number, text in enumerate(("No pneumonia", "large heart", "Old fractures"), 1)]
    assert split_sentences("\n".join(items)) == items
    assert report_sentences("FINDINGS:\n" + "\n".join(items)) == ["No pneumonia", "large heart", "Old fractures"]


@pytest.mark.parametrize("sentence", [
    "P.A. and lateral views of the chest were obtained.", "Opacity in the R. lower lobe.", "The L. Hemidiaphragm is high.", "Seen by J. Smith and A. B. Jones today.",
    "See No. 3 and fig. 2 of the series.", "The rt. base and lt. apex are clear.", "L.L.L. opacity vs. effusion, i.e. fluid.", "1.2. Clear lungs.", "An opacity, poss. old, of 2.5 cm.",
    "At 9 a.m. the tube was in place."])
def test_full_stops_that_end_nothing(sentence):
    assert split_sentences(sentence) == [sentence]
    assert split_sentences(f"Clear. {sentence} Normal.") == ["Clear.", sentence, "Normal."]


@pytest.mark.parametrize(("text", "plain"), [
    ("e\u0301panchement pleural", "épanchement pleural"), ("cardio\u00admegaly", "cardiomegaly"), ("cardio\u200bme\u2060galy", "cardiomegaly"), ("\ufeffclear", "clear"),
    ("\u202bclear\u202c lungs", "clear lungs"), ("\ufb01brosis", "fibrosis"), ("no\u00a0effusion\u202fseen", "no effusion seen"), ("ｃｌｅａｒ", "clear"), ("n\u0303o\u0327", "ño\u0327"),
    ("1 cm² · ½", "1 cm² · ½")])
def test_one_word_each(text, plain):
    assert normalise(text) == plain == normalise(plain)
    words = [text[start:end] for start, end in find_words(text)]
    assert [normalise(word) for word in words] == [plain[start:end] for start, end in find_words(plain)]
    assert report_sentences(f"FINDINGS: Now {text} is seen.") == [f"Now {plain} is seen."]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["e\u0301", "\u00ad", "\u200b", "\u0308", "a", "lung", " ", ".", "-", "é", "1", "\u202e", "_", "ﬁ", "\u00a0"]), max_size=20).map("".join))
def test_places_point_into_the_text_as_shown(text):
    spans = find_words(text)
    assert all(text[start].isalnum() or text[start] == "_" for start, _ in spans)
    assert all(unicodedata.category(text[end - 1]) != "Cf" for _, end in spans)
    assert [normalise(text[start:end]) for start, end in spans] == [normalise(text)[start:end] for start, end in find_words(normalise(text))] or text != normalise(text)


def seconds(function, text: str) -> float:
    "The least processor time of three runs"
    times = []
    for _ in range(3):
        begin = time.process_time()
        function(text)
        times.append(time.process_time() - begin)
    return min(times)


NASTY = ['."', ". ", "a.", "1. ", "\n ", "•", " ", "A", "FINDINGS: ", "\nLUNGS: ", "\n 1. ", "e.g. ", "\u0301", "&", "AND ", "\r", "__", "\nADDENDUM: "]


@pytest.mark.parametrize("piece", NASTY)
@pytest.mark.parametrize("function", [split_sentences, report_sentences, lambda text: report_sentences(text, LOVT_RULES), find_words, _unknown_headings, _section_name],
                         ids=["split", "report", "lovt", "words", "headings", "name"])
def test_time_grows_as_the_text(function, piece):
    "Eight times the text takes about eight times as long; a quadratic function takes 64 times"
    short, long = (seconds(function, piece * (size // len(piece))) for size in (4000, 32000))
    assert long < 24 * short + 0.05


def test_long_report_is_fast():
    assert len(split_sentences("The lungs are clear. No effusion of 1.5 cm is seen by Dr. Who. " * 2000)) == 4000

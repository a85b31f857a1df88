"""Accounts of what was read: found = used + left out."""

from liftkit.tally import Tally


def test_counts_add_up_and_names_have_reasons():
    tally = Tally("images")
    tally.use(4)
    for name in ("a.png", "b.png", "a.png", "c.png", "d.png"):
        tally.leave_out(name, "unreadable")
    tally.leave_out("e.png", "smaller than a patch")
    assert (tally.found, tally.used, tally.lost) == (9, 4, 5)
    assert tally.summary() == (
        "4 of 9 images used; left out: 4 unreadable (a.png, b.png, c.png and 1 more); 1 smaller than a patch (e.png)"
    )
    assert tally.to_json()["left_out"][0] == {
        "reason": "unreadable",
        "count": 4,
        "examples": ["a.png", "b.png", "c.png"],
    }


def test_nothing_left_out_is_silent():
    assert Tally("keys", used=3).summary() == ""


def test_two_readers_add_up():
    one, two = Tally("lines", 2), Tally("lines", 3)
    one.leave_out("x:1", "blank")
    two.leave_out("y:1", "blank")
    total = one + two
    assert (total.found, total.used) == (7, 5)
    assert list(total.left_out["blank"]) == ["x:1", "y:1"]
    assert one.lost == 1

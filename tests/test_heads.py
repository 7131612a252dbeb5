"""What heads are called, and what makes them of a class."""

from heads import head_class, head_named, name_of


def test_a_name_comes_back():
    assert name_of((1, 10)) == "1:10" and head_named("1:10") == (1, 10)


def test_head_classes():
    assert head_class(0.9, 0.8, 0.0) == "induction"
    assert head_class(0.9, -0.2, 0.0) == "prefix matching"
    assert head_class(0.9, 0.0, 0.0) == "prefix matching"
    assert head_class(0.0, 0.5, 0.7) == "previous token"
    assert head_class(0.1, 0.9, 0.1) == "other"


def test_four_tenths_of_the_attention_make_a_class():
    assert head_class(0.4, 0.9, 0.0) == "induction"
    assert head_class(0.39, 0.9, 0.0) == "other"
    assert head_class(0.0, 0.0, 0.4) == "previous token"
    assert head_class(0.0, 0.0, 0.39) == "other"

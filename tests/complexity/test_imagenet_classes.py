"""Flags of ImageNet classes, and the descriptions that a pipeline gives to labels."""

import pytest
from torchvision.models import ResNet18_Weights

from cat_fast.complexity import Description, describe_labels, imagenet_description
from cat_fast.complexity.imagenet_classes import imagenet_classes
from cat_fast.errors import UserError


def test_the_classes_are_those_of_torchvision_in_order() -> None:
    classes = imagenet_classes()
    assert [known.name for known in classes] == ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert [known.number for known in classes] == list(range(1000))
    synsets = [known.synset for known in classes]
    assert synsets == sorted(set(synsets))


def test_flags_of_some_classes() -> None:
    """Flags that hold for nearly every photograph."""
    for name in ("menu", "street sign", "comic book", "website"):
        assert imagenet_description(name if name != "website" else "web site").has_text, name
    assert imagenet_description("groom").has_faces
    assert imagenet_description("goldfish") == Description("this is an image of goldfish", False, False)


@pytest.mark.parametrize("label", [1, "goldfish", "goldfish, Carassius auratus", "n01443537", "Goldfish"])
def test_forms_of_a_label(label: str | int) -> None:
    assert imagenet_description(label).caption == "this is an image of goldfish"


def test_classes_that_differ_in_case_only() -> None:
    assert imagenet_description("Cardigan") != imagenet_description("cardigan")
    assert imagenet_description("Cardigan") == imagenet_classes()[264].description


@pytest.mark.parametrize("label", [1000, -1, "goldfishes", "n00000000", ""])
def test_other_labels_are_refused(label: str | int) -> None:
    with pytest.raises(UserError, match="ImageNet"):
        imagenet_description(label)


def test_labels_have_flags_only_if_all_are_of_imagenet() -> None:
    both = describe_labels(["menu", "n01443537", "great_white_shark"])
    assert [description.has_text for description in both] == [True, False, False]
    assert both[1].caption == "this is an image of goldfish"
    mixed = describe_labels(["menu", "my own class"])
    assert [description.has_text for description in mixed] == [None, None]

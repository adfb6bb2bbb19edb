"""Lines below the progress bar with the latest terms per ratio."""

from cat_fast.training.metrics.terms_by_ratio import TermsByRatio


def test_each_ratio_keeps_its_latest_values():
    terms = TermsByRatio()
    terms.update(
        {
            "loss": 0.9,
            "loss_16x": 0.25,
            "l1_16x": 0.1234,
            "weighted/l1_16x": 0.1234,
            "discriminator_accuracy_16x": 0.714,
            "real_logit_16x": 1.0,
            "images": 8.0,
        }
    )
    terms.update({"loss_8x": 0.5, "l1_8x": 0.25})
    terms.update({"loss_16x": 0.24, "l1_16x": 0.1})
    assert terms.lines() == [
        "8x: loss 0.5, l1 0.25",
        "16x: loss 0.24, l1 0.1, discriminator accuracy 71%",
    ]

//! A badge: one word of what the results come to, and how many cases that rests on.

use maud::html;

use crate::{
    runs::Results,
    words::{Counts, Verdict},
};

/// The SVG.
pub(crate) fn text(results: &Results) -> String {
    let counts = Counts::all(results);
    let (verdict, all) = (Verdict::of(results), counts.passed + counts.red);
    let (told, colour) = match verdict {
        Verdict::Passed => (format!("{} passed", counts.passed), "#1a7f37"),
        Verdict::Failed if 0 < counts.red => (format!("{} of {all} wrong", counts.red), "#b3261e"),
        Verdict::Failed => ("failed".to_owned(), "#b3261e"),
        Verdict::Slower => ("slower".to_owned(), "#9a5b00"),
        Verdict::Incomplete | Verdict::Nothing => (verdict.word().to_owned(), "#5f6368"),
    };
    // Letters of this size are about seven units wide; what they take is set, so that no font spills over.
    let wide = |text: &str| 7 * text.chars().count() + 14;
    let (left, right) = (wide("karat"), wide(&told));
    let label = format!("karat: {told}");
    let (all, middle) = (left + right, left + right / 2);
    html! {
        svg xmlns="http://www.w3.org/2000/svg" width=(all) height="20" role="img" aria-label=(label) {
            title { (label) }
            rect width=(left) height="20" fill="#3c4043" {}
            rect x=(left) width=(right) height="20" fill=(colour) {}
            g fill="#ffffff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" {
                text x=(left / 2) y="14" textLength=(left - 14) lengthAdjust="spacingAndGlyphs" { "karat" }
                text x=(middle) y="14" textLength=(right - 14) lengthAdjust="spacingAndGlyphs" { (told) }
            }
        }
    }
    .into_string()
        + "\n"
}

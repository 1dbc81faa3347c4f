//! Plots as SVG that stands in a page: text stays text, and the page's style gives the colours.

use std::ops::Range;

use maud::{Markup, PreEscaped, html};
use plotters::{
    coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter},
    prelude::*,
};

/// What is ink, and what is a line behind it. The style sheet puts its own in their places.
const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
const GRID: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
const SERIES: [RGBColor; 6] = [
    RGBColor(0x09, 0x69, 0xda),
    RGBColor(0xbc, 0x4c, 0x00),
    RGBColor(0x1a, 0x7f, 0x37),
    RGBColor(0x82, 0x50, 0xdf),
    RGBColor(0xbf, 0x39, 0x89),
    RGBColor(0x57, 0x60, 0x6a),
];

/// A number on an axis, where it stands, and how it is written.
pub(super) type Tick = (f64, String);

/// An axis. What is drawn has been put to scale before.
pub(super) struct Axis {
    /// What it shows, with its unit.
    pub(super) label: String,
    pub(super) range: Range<f64>,
    pub(super) ticks: Vec<Tick>,
}

impl Axis {
    /// From zero, or from below it, to above what is most.
    pub(super) fn linear(label: &str, values: &[f64]) -> Axis {
        let (low, high) = ends(values, (0.0, 1.0));
        let low = low.min(0.0);
        let step = step((high - low).max(f64::MIN_POSITIVE) / 4.0);
        let (first, last) =
            ((low / step).floor(), (high / step).ceil().max((low / step).floor() + 1.0));
        let digits = (-step.log10().floor()).max(0.0) as usize;
        let count = (last - first) as usize;
        let ticks = (0..=count).map(|i| {
            let at = (first + i as f64) * step;
            (at, short(at, digits))
        });
        Axis { label: label.to_owned(), range: first * step..last * step, ticks: ticks.collect() }
    }

    /// Decades; values are their logarithms.
    pub(super) fn decades(label: &str, values: &[f64]) -> Axis {
        let (low, high) = ends(values, (0.0, 1.0));
        let (mut first, mut last) = (low.floor(), high.ceil());
        if last - first < 1.0 {
            first -= 1.0;
            last += 1.0;
        }
        let every = ((last - first) / 6.0).ceil().max(1.0) as usize;
        let mut ticks: Vec<Tick> = Vec::new();
        for k in (0..=(last - first) as usize).step_by(every) {
            let decade = first + k as f64;
            ticks.push((decade, power(decade)));
            // Where there are few decades, parts of them.
            if last - first <= 2.0 && decade < last {
                ticks.extend(
                    [2.0_f64, 5.0]
                        .map(|part| (decade + part.log10(), power(decade + part.log10()))),
                );
            }
        }
        Axis { label: label.to_owned(), range: first..last, ticks }
    }
}

/// An axis as the plotting library asks for one.
struct Scale<'a> {
    axis: &'a Axis,
    /// Where a tick is drawn.
    places: Vec<f64>,
}

impl Ranged for Scale<'_> {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let Range { start, end } = self.axis.range;
        let share = (value - start) / (end - start);
        (f64::from(limit.0) + share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.places.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.axis.range.clone()
    }
}

impl ValueFormatter<f64> for Scale<'_> {
    fn format_ext(&self, value: &f64) -> String {
        let off = |tick: &Tick| (tick.0 - value).abs();
        let near = self.axis.ticks.iter().min_by(|a, b| off(a).total_cmp(&off(b)));
        near.map_or(String::new(), |(_, text)| text.clone())
    }
}

/// A power of ten as it is read most easily.
fn power(exponent: f64) -> String {
    let value = 10_f64.powf(exponent);
    match exponent {
        e if (3.0 - 1e-9..6.0 - 1e-9).contains(&e) => format!("{}k", (value / 1e3).round()),
        e if (6.0 - 1e-9..9.0 - 1e-9).contains(&e) => format!("{}M", (value / 1e6).round()),
        e if (0.0 - 1e-9..3.0 - 1e-9).contains(&e) => format!("{}", value.round()),
        e if (-3.0..0.0).contains(&e) => format!("{value:.*}", (-e).ceil() as usize),
        _ => format!("{value:.0e}"),
    }
}

fn short(value: f64, digits: usize) -> String {
    match value.abs() {
        x if x < 1e4 => format!("{value:.digits$}"),
        x if x < 1e6 => format!("{}k", value / 1e3),
        _ => format!("{}M", value / 1e6),
    }
}

/// One, two or five times a power of ten, and at least this.
fn step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|k| k * power)
        .find(|step| least <= *step)
        .unwrap_or(power)
}

fn ends(values: &[f64], without: (f64, f64)) -> (f64, f64) {
    let finite = || values.iter().copied().filter(|x| x.is_finite());
    match (finite().reduce(f64::min), finite().reduce(f64::max)) {
        (Some(low), Some(high)) => (low, high),
        _ => without,
    }
}

/// A context on an axis that has room for none and for a million: straight to about a thousand tokens,
/// from there on by powers.
pub(super) fn context(tokens: f64) -> f64 {
    (1.0 + tokens / 1024.0).log2()
}

/// The axis of contexts up to this many tokens.
pub(super) fn contexts(most: f64) -> Axis {
    let all = [0_u32, 1, 4, 16, 64, 256, 1024, 4096];
    let last = all.iter().copied().find(|k| most <= f64::from(*k) * 1024.0).unwrap_or(4096);
    let ticks = all.into_iter().filter(|k| *k <= last).map(|k| {
        let text = match k {
            0 => "0".to_owned(),
            k if k < 1024 => format!("{k}k"),
            k => format!("{}M", k / 1024),
        };
        (context(f64::from(k) * 1024.0), text)
    });
    let ticks: Vec<Tick> = ticks.collect();
    let end = context(f64::from(last.max(1)) * 1024.0);
    Axis { label: "context, tokens (k = 1024)".to_owned(), range: 0.0..end, ticks }
}

/// How points are marked: by shape as well as by colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Draw {
    /// Marks alone.
    Points,
    /// Marks with a line through them.
    Both,
    /// A line alone.
    Line,
    /// A line in ink: a roof, a limit.
    Limit,
}

/// Points that belong together.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) draw: Draw,
    /// The colour and shape, those of others with the same number.
    pub(super) as_number: usize,
    pub(super) points: Vec<(f64, f64)>,
}

impl Series {
    fn colour(&self) -> RGBColor {
        SERIES[self.as_number % SERIES.len()]
    }

    /// One of three; with its colour it is another's after eighteen.
    fn shape(&self) -> usize {
        (self.as_number + self.as_number / SERIES.len()) % 3
    }
}

/// A plot with its caption: once as wide as a page, once as wide as a phone.
pub(super) fn figure(title: &str, x: &Axis, y: &Axis, series: &[Series], note: &str) -> Markup {
    let wide = draw(740, 400, x, y, series, title);
    let narrow = draw(360, 300, x, y, series, title);
    html! {
        figure.plot {
            figcaption { b { (title) } @if !note.is_empty() { " " (note) } }
            (PreEscaped(marked(&wide, "wide", title)))
            (PreEscaped(marked(&narrow, "narrow", title)))
            ul.legend {
                @for one in series.iter().filter(|one| !one.name.is_empty()) {
                    li { (swatch(one)) (one.name) }
                }
            }
        }
    }
}

/// The mark of a series, as in the plot.
fn swatch(series: &Series) -> Markup {
    let colour = match series.draw {
        Draw::Limit => hex(INK),
        _ => hex(series.colour()),
    };
    html! {
        svg.swatch viewBox="0 0 16 12" aria-hidden="true" {
            @match series.draw {
                Draw::Limit => { line x1="0" y1="6" x2="16" y2="6" stroke=(colour) stroke-width="1.5" {} }
                Draw::Line => { line x1="0" y1="6" x2="16" y2="6" stroke=(colour) stroke-width="2" {} }
                _ => @match series.shape() {
                    0 => { circle cx="8" cy="6" r="4" fill=(colour) {} }
                    1 => { polygon points="8,1 13,11 3,11" fill=(colour) {} }
                    _ => { path d="M4,2 L12,10 M12,2 L4,10" stroke=(colour) stroke-width="2" {} }
                },
            }
        }
    }
}

fn hex(RGBColor(r, g, b): RGBColor) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// An SVG with the name of a class and one that is read aloud.
fn marked(svg: &str, class: &str, title: &str) -> String {
    let title = title.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;");
    svg.replacen(
        "<svg ",
        &format!("<svg class=\"{class}\" role=\"img\" aria-label=\"{title}\" "),
        1,
    )
}

fn draw(width: u32, height: u32, x: &Axis, y: &Axis, series: &[Series], title: &str) -> String {
    let mut svg = String::new();
    // Only a backend that fails makes drawing fail; this one writes to memory.
    let drawn = try_draw(&mut svg, (width, height), x, y, series);
    match drawn {
        Ok(()) => svg,
        Err(e) => {
            format!("<svg width=\"{width}\" height=\"20\"><text y=\"14\">{title}: {e}</text></svg>")
        }
    }
}

fn try_draw(
    svg: &mut String,
    size: (u32, u32),
    x: &Axis,
    y: &Axis,
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    let narrow = size.0 < 500;
    let places = |axis: &Axis| axis.ticks.iter().map(|(at, _)| *at).collect::<Vec<f64>>();
    // What stands close together is written once.
    let x_places = if narrow { thinned(&places(x), 7) } else { places(x) };
    let x_scale = Scale { axis: x, places: x_places };
    let y_scale = Scale { axis: y, places: places(y) };
    // Half of what is written below the end of the axis stands beyond it.
    let last = x.ticks.last().map_or(0, |(_, text)| text.chars().count());
    let mut chart = ChartBuilder::on(&root)
        .margin_top(12)
        .margin_right(22.max(4 * last as u32))
        .margin_left(6)
        .x_label_area_size(48)
        .y_label_area_size(if narrow { 58 } else { 66 })
        .build_cartesian_2d(x_scale, y_scale)?;
    let font = |points: f64| ("sans-serif", points * 1.24).into_font().color(&INK);
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .x_labels(30)
        .y_labels(30)
        .x_desc(&x.label)
        .y_desc(&y.label)
        .axis_desc_style(font(12.5))
        .label_style(font(12.0))
        .draw()?;
    for one in series {
        let colour = one.colour();
        let inside = one.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
        let points: Vec<(f64, f64)> = inside.collect();
        match one.draw {
            Draw::Limit => {
                chart.draw_series(LineSeries::new(points.clone(), INK.stroke_width(1)))?;
            }
            Draw::Line | Draw::Both => {
                chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
            }
            Draw::Points => {}
        }
        if matches!(one.draw, Draw::Points | Draw::Both) {
            let points = points.iter();
            match one.shape() {
                0 => chart.draw_series(points.map(|at| Circle::new(*at, 4, colour.filled())))?,
                1 => chart
                    .draw_series(points.map(|at| TriangleMarker::new(*at, 5, colour.filled())))?,
                _ => chart
                    .draw_series(points.map(|at| Cross::new(*at, 4, colour.stroke_width(2))))?,
            };
        }
    }
    root.present()?;
    Ok(())
}

/// At most so many of some places, the ends among them.
fn thinned(places: &[f64], most: usize) -> Vec<f64> {
    let every = places.len().div_ceil(most).max(1);
    places.iter().copied().step_by(every).collect()
}

#[cfg(test)]
mod tests {
    use super::{Axis, Draw, Series, context, contexts, figure};

    #[test]
    fn no_two_of_eighteen_are_marked_alike() {
        let series = |as_number| Series {
            name: String::new(),
            draw: Draw::Points,
            as_number,
            points: Vec::new(),
        };
        let marks: std::collections::BTreeSet<_> = (0..18)
            .map(series)
            .map(|one| (one.colour().0, one.colour().1, one.colour().2, one.shape()))
            .collect();
        assert_eq!(marks.len(), 18);
    }

    #[test]
    fn what_stands_at_the_end_of_an_axis_is_whole() {
        let ticks = vec![(0.0, "emb".to_owned()), (1.0, "a long name".to_owned())];
        let x = Axis { label: "x".to_owned(), range: 0.0..1.0, ticks };
        let svg = super::draw(740, 400, &x, &Axis::linear("y", &[1.0]), &[], "t");
        // Where the last tick stands, in the middle of its text; a letter is some 7.4 wide.
        let at =
            svg.split("a long name").next().and_then(|before| before.rsplit("<text x=\"").next());
        let at: f64 = at.and_then(|x| x.split('"').next()).unwrap().parse().unwrap();
        assert!(at + 11.0 * 7.4 / 2.0 < 740.0, "{at}");
    }

    #[test]
    fn axes_hold_their_values_and_end_at_ticks() {
        for values in [&[0.3, 7.9][..], &[1e-9, 2e-9], &[5.0], &[0.0, 1e6], &[f64::NAN]] {
            let axis = Axis::linear("x", values);
            let within = values
                .iter()
                .filter(|x| x.is_finite())
                .all(|x| axis.range.contains(x) || *x == axis.range.end);
            assert!(within, "{values:?} {:?}", axis.range);
            let (first, last) = (axis.ticks.first().unwrap().0, axis.ticks.last().unwrap().0);
            assert_eq!((first, last), (axis.range.start, axis.range.end));
            assert!(axis.ticks.len() < 9, "{:?}", axis.ticks);
        }
        let axis = Axis::decades("x", &[-0.5, 2.2]);
        assert_eq!(axis.range, -1.0..3.0);
        let texts: Vec<_> = axis.ticks.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["0.1", "1", "10", "100", "1k"]);
        assert_eq!(contexts(100_000.0).ticks.last().unwrap().1, "256k");
        assert!(contexts(262_144.0).range.end == context(262_144.0));
    }

    #[test]
    fn a_plot_says_what_it_shows_in_text() {
        let series = [Series {
            name: "a < b".to_owned(),
            draw: Draw::Both,
            as_number: 0,
            points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)],
        }];
        let x = Axis::linear("layers", &[0.0, 2.0]);
        let y = Axis::linear("share of the bound, %", &[1.0, 3.0]);
        let page = figure("budget & more", &x, &y, &series, "").into_string();
        for text in ["layers", "share of the bound, %", "budget &amp; more", "a &lt; b", "viewBox"]
        {
            assert!(page.contains(text), "{text}: {page}");
        }
        assert!(!page.contains("NaN") && !page.contains("<script"), "{page}");
    }
}

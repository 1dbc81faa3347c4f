//! `gate.toml`: what may be slower, by how much, why and until when.

use std::path::Path;

use serde::Deserialize;

use crate::exit::refuse;

/// What the file may say.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct Policy {
    /// The smallest change that counts, as a share.
    min_effect: Option<f64>,
    /// The margin within which the same is proven.
    margin: Option<f64>,
    /// Floors of cases whose ids hold these words; the largest that fits counts.
    floors: std::collections::BTreeMap<String, f64>,
    /// What is let through.
    allow: Vec<Allow>,
}

/// A case that may be slower or otherwise than it was.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Allow {
    /// What its id holds.
    case: String,
    /// Why.
    reason: String,
    /// The last day on which it is let through.
    expires: toml::value::Datetime,
}

impl Policy {
    /// Reads a file.
    ///
    /// # Errors
    /// File, line and what is wrong.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Policy> {
        let text =
            golden::file::text(path).map_err(|e| refuse(format!("{}: {e}", path.display())))?;
        let line = |at: usize| 1 + text.get(..at).unwrap_or("").matches('\n').count();
        let policy: Policy = toml::from_str(&text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let what = e.message().replace("unknown field", "unknown key").replace('\n', " ");
            refuse(format!("{}:{}: {what}", path.display(), line(at)))
        })?;
        let wrong = |what: String| refuse(format!("{}: {what}", path.display()));
        let shares = [("min-effect", policy.min_effect), ("margin", policy.margin)];
        let shares = shares.into_iter().filter_map(|(name, share)| Some((name.to_owned(), share?)));
        let floors = policy.floors.iter().map(|(case, &floor)| (format!("floors.{case:?}"), floor));
        for (name, share) in shares.chain(floors) {
            if !(0.0 < share && share < 1.0) {
                return Err(wrong(format!("{name}: {share}, expected a share between 0 and 1")));
            }
        }
        for (i, allow) in policy.allow.iter().enumerate() {
            let entry = i + 1;
            if allow.reason.trim().is_empty() {
                return Err(wrong(format!("allow entry {entry}: it needs a reason")));
            }
            if allow.case.trim().is_empty() {
                return Err(wrong(format!("allow entry {entry}: it needs a case")));
            }
            if allow.expires.date.is_none() || allow.expires.time.is_some() {
                let got = &allow.expires;
                return Err(wrong(format!("allow entry {entry}: expires {got}, expected a day")));
            }
        }
        Ok(policy)
    }

    /// The rule of a case that is off so much by itself.
    pub(crate) fn rule(&self, case: &str, floor: f64) -> benches::pairs::verdict::Rule {
        let own = self.floors.iter().filter(|(words, _)| case.contains(words.as_str()));
        let own = own.map(|(_, floor)| *floor).reduce(f64::max);
        let rule = benches::pairs::verdict::Rule::over(floor);
        benches::pairs::verdict::Rule {
            // A floor that somebody has set is not too high for him.
            floor: own.map_or(floor, |own| own.max(floor)),
            gated: own.is_some_and(|own| floor <= own),
            effect: self.min_effect.unwrap_or(rule.effect),
            margin: self.margin.unwrap_or(rule.margin),
            ..rule
        }
    }

    /// Whether a case is let through on a day, and in which words; `Err` has those of an entry that is
    /// over.
    pub(crate) fn allowed(
        &self,
        case: &str,
        today: (u64, u64, u64),
    ) -> Result<Option<String>, String> {
        let mut over = None;
        for allow in self.allow.iter().filter(|allow| case.contains(&allow.case)) {
            let Some(last) = allow.expires.date else { continue };
            let last_day = (u64::from(last.year), u64::from(last.month), u64::from(last.day));
            if today <= last_day {
                return Ok(Some(format!("allowed until {last}: {}", allow.reason)));
            }
            over = Some(format!("was allowed until {last}: {}", allow.reason));
        }
        over.map_or(Ok(None), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::Policy;

    fn read(text: &str) -> Result<Policy, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gate.toml");
        fs::write(&path, text).unwrap();
        Policy::read(&path).map_err(|e| e.to_string().replace(&path.display().to_string(), "F"))
    }

    #[test]
    fn an_entry_holds_until_its_day_is_over() {
        let policy = read(
            "min-effect = 0.05\n[floors]\nrms = 0.04\nrms_norm = 0.08\n\
             [[allow]]\ncase = \"linear/\"\nreason = \"new layout\"\nexpires = 2026-12-31\n",
        )
        .unwrap();
        let allowed = |day| policy.allowed("linear/N1-M2-D3@cpu/avx2", day);
        assert_eq!(
            allowed((2026, 12, 31)),
            Ok(Some("allowed until 2026-12-31: new layout".to_owned()))
        );
        assert_eq!(
            allowed((2027, 1, 1)),
            Err("was allowed until 2026-12-31: new layout".to_owned())
        );
        assert_eq!(policy.allowed("rope/N1@cpu/avx2", (2026, 1, 1)), Ok(None));
        let rule = policy.rule("rms_norm/N1-D2@cpu/avx2", 0.01);
        assert_eq!((rule.floor, rule.effect, rule.ungateable()), (0.08, 0.05, false));
        assert_eq!(policy.rule("rope/N1@cpu/avx2", 0.01).floor, 0.01);
    }

    #[test]
    fn what_is_wrong_in_it_is_said_with_its_place() {
        for (text, want) in [
            (
                "[[allow]]\ncase = \"a\"\nreason = \" \"\nexpires = 2026-01-01\n",
                "F: allow entry 1: it needs a reason",
            ),
            ("[[allow]]\ncase = \"a\"\nexpires = 2026-01-01\n", "F:1: missing field `reason`"),
            ("[[allow]]\ncase = \"a\"\nreason = \"b\"\n", "F:1: missing field `expires`"),
            (
                "[[allow]]\ncase = \"a\"\nreason = \"b\"\nexpires = 10:00:00\n",
                "F: allow entry 1: expires 10:00:00, expected a day",
            ),
            (
                "\nfloor = 3\n",
                "F:2: unknown key `floor`, expected one of `min-effect`, `margin`, `floors`, `allow`",
            ),
            ("[floors]\na = 2.0\n", "F: floors.\"a\": 2, expected a share between 0 and 1"),
            ("min-effect = -0.1\n", "F: min-effect: -0.1, expected a share between 0 and 1"),
        ] {
            assert_eq!(read(text).unwrap_err(), want);
        }
    }
}

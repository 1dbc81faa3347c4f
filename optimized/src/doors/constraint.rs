//! What problems a foreign kernel takes: `[constraints]` of `kernel.toml`.
//!
//! A key is an expression over the letters of a case, `dtype` or `host`; a value is a number, a list
//! of them, or text: `">= 64"`, `"64..=256"`.

use std::fmt;

use golden::{Dtype, Host, op::MAX_SIZE};

use super::expr::Expr;

/// All of them hold, or the kernel does not take the problem.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Constraints {
    sizes: Vec<Condition>,
    dtypes: Option<Vec<Dtype>>,
    features: Vec<String>,
}

/// One condition on sizes.
#[derive(Clone, Debug, PartialEq)]
struct Condition {
    left: Expr,
    right: Values,
}

#[derive(Clone, Debug, PartialEq)]
enum Values {
    OneOf(Vec<i64>),
    /// Both ends are meant.
    Between(i64, i64),
}

impl Values {
    fn hold(&self, value: i64) -> bool {
        match self {
            Values::OneOf(values) => values.contains(&value),
            Values::Between(low, high) => (*low..=*high).contains(&value),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.right {
            Values::OneOf(values) if values.len() == 1 => {
                write!(f, "{} = {}", self.left, values[0])
            }
            Values::OneOf(values) => write!(f, "{} in {values:?}", self.left),
            Values::Between(low, i64::MAX) => write!(f, "{} >= {low}", self.left),
            Values::Between(i64::MIN, high) => write!(f, "{} <= {high}", self.left),
            Values::Between(low, high) => write!(f, "{low} <= {} <= {high}", self.left),
        }
    }
}

impl fmt::Display for Constraints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all: Vec<String> = self.sizes.iter().map(ToString::to_string).collect();
        if let Some(dtypes) = &self.dtypes {
            let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
            all.push(format!("dtype {}", names.join(" or ")));
        }
        all.extend(self.features.iter().map(|feature| format!("host {feature}")));
        f.write_str(if all.is_empty() { "none" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}

/// Letters with their sizes.
pub(super) type Sizes = [(&'static str, usize)];

impl Constraints {
    /// Reads the table.
    ///
    /// # Errors
    /// One line per mistake: key, expected, got. An expression that no size can satisfy is a mistake.
    pub(super) fn read(table: &toml::Table) -> Result<Constraints, String> {
        let mut all = Constraints::default();
        for (key, value) in table {
            let wrong = |expected: &str| format!("{key}: expected {expected}, got {value}");
            match key.as_str() {
                "dtype" => {
                    let dtypes = texts(value)
                        .ok_or_else(|| wrong("a dtype or a list of them, such as [\"bf16\"]"))?;
                    let known = [Dtype::F32, Dtype::F16, Dtype::Bf16];
                    let of =
                        |name: &&str| known.iter().copied().find(|dtype| dtype.name() == *name);
                    let found: Option<Vec<Dtype>> = dtypes.iter().map(of).collect();
                    let found = found.filter(|found| !found.is_empty());
                    all.dtypes = Some(found.ok_or_else(|| wrong("some of f32, f16, bf16"))?);
                }
                "host" => {
                    let features = texts(value)
                        .ok_or_else(|| wrong("processor features, such as [\"avx512f\"]"))?;
                    all.features = features.into_iter().map(str::to_owned).collect();
                }
                _ => all.sizes.push(Condition::read(key, value)?),
            }
        }
        Ok(all)
    }

    /// Letters that stand in conditions.
    pub(super) fn letters(&self) -> Vec<&str> {
        self.sizes.iter().flat_map(|condition| condition.left.letters()).collect()
    }

    /// Why the kernel does not take these sizes, if so. Conditions on letters that the op does not
    /// have are about other ops.
    pub fn refuse(&self, sizes: &Sizes, dtype: Dtype) -> Option<String> {
        if let Some(dtypes) = &self.dtypes
            && !dtypes.contains(&dtype)
        {
            let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
            return Some(format!("takes dtype {}, not {dtype}", names.join(" or ")));
        }
        let broken = self.sizes.iter().find(|condition| condition.holds(sizes) == Some(false))?;
        Some(format!("takes {broken}"))
    }

    /// What this machine lacks, if something.
    pub fn lacks(&self, host: &Host) -> Option<String> {
        let missing = self.features.iter().find(|wanted| {
            !host.features.contains(&wanted.as_str()) && *wanted != std::env::consts::ARCH
        })?;
        Some(format!("this machine has no {missing}"))
    }

    /// The problem nearest to this one that the kernel takes and that is one of the op (`fits`): sizes
    /// grown as little as it takes, the first dtype that it names. `None` if it was not found.
    pub fn adapt(
        &self,
        sizes: &Sizes,
        dtype: Dtype,
        fits: &dyn Fn(&Sizes, Dtype) -> bool,
    ) -> Option<(Vec<(&'static str, usize)>, Dtype)> {
        let dtype = match &self.dtypes {
            Some(dtypes) if !dtypes.contains(&dtype) => dtypes[0],
            _ => dtype,
        };
        let settled = self.settled(sizes)?;
        let both = |sizes: &Sizes| self.hold(sizes) && fits(sizes, dtype);
        if both(&settled) {
            return Some((settled, dtype));
        }
        let moved = moves(sizes, &settled).into_iter().find_map(|(_, _, moves)| {
            let mut sizes = settled.clone();
            for (at, size) in moves {
                sizes[at].1 = size;
            }
            both(&sizes).then_some(sizes)
        });
        Some((moved?, dtype))
    }

    fn hold(&self, sizes: &Sizes) -> bool {
        self.sizes.iter().all(|condition| condition.holds(sizes) != Some(false))
    }

    /// The sizes nearest to these with which all conditions hold, whatever the op says of them.
    fn settled(&self, sizes: &Sizes) -> Option<Vec<(&'static str, usize)>> {
        let mut sizes = sizes.to_vec();
        // Settling one condition may break another that shares a letter; a few rounds settle all that
        // can be settled so.
        for _ in 0..4 {
            let Some(broken) =
                self.sizes.iter().find(|condition| condition.holds(&sizes) == Some(false))
            else {
                return Some(sizes);
            };
            // What depends on one letter is fixed first, so that sums and ratios follow it.
            let mine: Vec<usize> = (0..sizes.len())
                .filter(|&at| broken.left.letters().contains(&sizes[at].0))
                .collect();
            let found = mine.iter().find_map(|&at| self.settle(broken, &sizes, at))?;
            sizes = found;
        }
        None
    }

    /// Another size of letter `at` with which `broken` and everything about that letter alone holds.
    fn settle(
        &self,
        broken: &Condition,
        sizes: &Sizes,
        at: usize,
    ) -> Option<Vec<(&'static str, usize)>> {
        let (letter, now) = sizes[at];
        let mut sizes = sizes.to_vec();
        let search = 1 << 16;
        (now + 1..=search).chain((1..now.min(search)).rev()).find_map(|size| {
            sizes[at].1 = size;
            let own = |condition: &&Condition| condition.left.letters() == [letter];
            let all = std::iter::once(broken).chain(self.sizes.iter().filter(own));
            all.into_iter()
                .all(|condition| condition.holds(&sizes) != Some(false))
                .then(|| sizes.clone())
        })
    }
}

/// Which letters get which sizes, after how much is shrunk and how far they move.
type Move = (usize, usize, Vec<(usize, usize)>);

/// Up to this size a letter keeps its ratio to one that was settled: those are numbers of heads and
/// experts. A kernel that mixes up which head shares which shows only where some are shared.
const SHARED: usize = 64;
/// How far one letter is moved alone, and two together.
const FAR: usize = 512;
const NEAR: usize = 8;

/// Changes of one letter or two that may make a problem of an op out of settled sizes, in the order
/// in which they are tried: ratios kept, one letter, two letters; grown before shrunk, least first.
fn moves(before: &Sizes, settled: &Sizes) -> Vec<Move> {
    let places = 0..settled.len();
    let kept: Vec<Vec<usize>> = places.clone().map(|at| ratios(before, settled, at)).collect();
    let change = |moves: Vec<(usize, usize)>| -> Move {
        let shrunk = moves.iter().filter(|&&(at, to)| to < settled[at].1).count();
        let far = moves.iter().map(|&(at, to)| to.abs_diff(settled[at].1)).sum();
        (shrunk, far, moves)
    };
    let alone = |of: &dyn Fn(usize) -> Vec<usize>| {
        let mut all: Vec<Move> = places
            .clone()
            .flat_map(|at| of(at).into_iter().map(move |to| change(vec![(at, to)])))
            .collect();
        all.sort();
        all
    };
    let close: Vec<Vec<usize>> = places
        .clone()
        .map(|at| [kept[at].clone(), others(settled, at, NEAR, 0)].concat())
        .collect();
    let mut pairs: Vec<Move> = Vec::new();
    for second in places.clone() {
        for first in 0..second {
            for &a in &close[first] {
                pairs.extend(close[second].iter().map(|&b| change(vec![(first, a), (second, b)])));
            }
        }
    }
    pairs.sort();
    let kept = alone(&|at| kept[at].clone());
    let one = alone(&|at| others(settled, at, FAR, FAR / 2));
    [kept, one, pairs].concat()
}

/// Sizes of a letter that keep its ratio to a letter that was settled.
fn ratios(before: &Sizes, settled: &Sizes, at: usize) -> Vec<usize> {
    let now = settled[at].1;
    let mut all: Vec<usize> = before
        .iter()
        .zip(settled)
        .filter(|((_, from), (_, to))| from != to && 0 < *from)
        .filter_map(|(&(_, from), &(_, to))| {
            let scaled = now.checked_mul(to)?;
            (scaled.is_multiple_of(from)).then(|| scaled / from)
        })
        .filter(|&scaled| scaled != now && (1..=SHARED).contains(&scaled))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Sizes of a letter around its own, those of the others and a bit more, and their multiples on
/// either side: what ops ask of two letters is that one divides the other, or is not above it.
fn others(settled: &Sizes, at: usize, around: usize, above: usize) -> Vec<usize> {
    let now = settled[at].1;
    let mut all: Vec<usize> = (now.saturating_sub(around)..=now.saturating_add(around)).collect();
    for &(_, other) in settled {
        all.extend(other..=other.saturating_add(above));
        all.extend([now.next_multiple_of(other.max(1)), now - now % other.max(1)]);
    }
    all.retain(|&size| size != now && 0 < size && size <= MAX_SIZE);
    all.sort_unstable();
    all.dedup();
    all
}

impl Condition {
    fn read(key: &str, value: &toml::Value) -> Result<Condition, String> {
        let left = Expr::parse(key)?;
        if left.letters().is_empty() {
            return Err(format!("{key}: expected an expression over the letters of a case"));
        }
        let expected = "a number, a list of numbers, \">= n\", \"<= n\" or \"n..=m\"";
        let right =
            values(value).ok_or_else(|| format!("{key}: expected {expected}, got {value}"))?;
        // What the left side can be at all.
        let possible = match left.remainder() {
            Some(by) if by < 1 => return Err(format!("{key}: a remainder of {by}")),
            Some(by) => Values::Between(0, by - 1),
            None if left.is_letter() => Values::Between(1, MAX_SIZE as i64),
            None => Values::Between(i64::MIN, i64::MAX),
        };
        let condition = Condition { left, right };
        let some = match (&condition.right, &possible) {
            (Values::OneOf(values), possible) => values.iter().any(|&v| possible.hold(v)),
            (Values::Between(low, high), Values::Between(least, most)) => {
                low.max(least) <= high.min(most)
            }
            (Values::Between(..), Values::OneOf(_)) => true,
        };
        if some { Ok(condition) } else { Err(format!("{condition}: impossible")) }
    }

    /// Whether it holds; nothing if it is about a letter that is not there.
    fn holds(&self, sizes: &Sizes) -> Option<bool> {
        let find = |letter: &str| {
            sizes.iter().find(|(name, _)| *name == letter).map(|&(_, size)| size as i64)
        };
        if self.left.letters().iter().any(|letter| find(letter).is_none()) {
            return None;
        }
        // An expression without a value, such as a division by zero, holds for nobody.
        Some(self.left.value(&find).is_ok_and(|value| self.right.hold(value)))
    }
}

fn texts(value: &toml::Value) -> Option<Vec<&str>> {
    match value {
        toml::Value::String(text) => Some(vec![text]),
        toml::Value::Array(all) => all.iter().map(toml::Value::as_str).collect(),
        _ => None,
    }
}

fn values(value: &toml::Value) -> Option<Values> {
    match value {
        toml::Value::Integer(number) => Some(Values::OneOf(vec![*number])),
        toml::Value::Array(all) => {
            let all: Option<Vec<i64>> = all.iter().map(toml::Value::as_integer).collect();
            all.map(Values::OneOf)
        }
        toml::Value::String(text) => {
            let number = |text: &str| text.trim().parse::<i64>().ok();
            let text = text.trim();
            if let Some((low, high)) = text.split_once("..=") {
                return Some(Values::Between(number(low)?, number(high)?));
            }
            if let Some(rest) = text.strip_prefix(">=") {
                return Some(Values::Between(number(rest)?, i64::MAX));
            }
            Some(Values::Between(i64::MIN, number(text.strip_prefix("<=")?)?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use golden::Dtype;

    use super::Constraints;

    fn read(text: &str) -> Result<Constraints, String> {
        Constraints::read(&text.parse().expect("a table"))
    }

    #[test]
    fn what_they_take() {
        let all = read(
            "K = 128\n\"T % 64\" = 0\nV = [64, 128]\nB = '<= 4'\n\"HV / HK\" = '1..=2'\ndtype = 'bf16'\nQ = 7",
        )
        .unwrap();
        let sizes =
            |b, t, hk, hv, k, v| [("B", b), ("T", t), ("HK", hk), ("HV", hv), ("K", k), ("V", v)];
        assert_eq!(all.refuse(&sizes(1, 64, 2, 4, 128, 64), Dtype::Bf16), None);
        for (sizes, dtype, why) in [
            (sizes(1, 64, 2, 4, 128, 64), Dtype::F32, "takes dtype bf16, not f32"),
            (sizes(1, 64, 2, 4, 64, 64), Dtype::Bf16, "takes K = 128"),
            (sizes(1, 65, 2, 4, 128, 64), Dtype::Bf16, "takes T % 64 = 0"),
            (sizes(1, 64, 2, 4, 128, 32), Dtype::Bf16, "takes V in [64, 128]"),
            (sizes(5, 64, 2, 4, 128, 64), Dtype::Bf16, "takes B <= 4"),
            (sizes(1, 64, 2, 6, 128, 64), Dtype::Bf16, "takes 1 <= HV / HK <= 2"),
        ] {
            assert_eq!(all.refuse(&sizes, dtype).as_deref(), Some(why));
        }
    }

    #[test]
    fn what_no_size_satisfies_is_a_mistake() {
        for (text, why) in [
            ("\"T % 64\" = 64", "T % 64 = 64: impossible"),
            ("K = 0", "K = 0: impossible"),
            ("K = []", "K in []: impossible"),
            ("K = '5..=4'", "5 <= K <= 4: impossible"),
            ("\"T % 0\" = 0", "T % 0: a remainder of 0"),
            ("\"3\" = 3", "3: expected an expression over the letters of a case"),
            ("\"K +\" = 3", "expression K +▸: expected a number, a letter or `(`"),
            ("dtype = []", "dtype: expected some of f32, f16, bf16, got []"),
            ("dtype = ['fp8']", "dtype: expected some of f32, f16, bf16, got [\"fp8\"]"),
            (
                "K = true",
                "K: expected a number, a list of numbers, \">= n\", \"<= n\" or \"n..=m\", got true",
            ),
        ] {
            assert_eq!(read(text).err().as_deref(), Some(why), "{text}");
        }
    }

    #[test]
    fn the_nearest_problem() {
        let all =
            read("\"T % 64\" = 0\nK = 128\n\"HV / HK\" = 2\ndtype = ['bf16', 'f16']").unwrap();
        let sizes = [("T", 65), ("HK", 3), ("HV", 3), ("K", 16)];
        let (sizes, dtype) = all.adapt(&sizes, Dtype::F32, &|_, _| true).unwrap();
        assert_eq!(dtype, Dtype::Bf16);
        assert_eq!(all.refuse(&sizes, dtype), None);
        assert_eq!((sizes[0].1, sizes[3].1), (128, 128));
        let none = read("T = 65\n\"T % 64\" = 0").unwrap();
        assert_eq!(none.adapt(&[("T", 1)], Dtype::F32, &|_, _| true), None);
    }

    /// What attention asks of its sizes.
    fn attention(sizes: &[(&'static str, usize)], _: Dtype) -> bool {
        let [t, tk, hq, hkv] = [0, 1, 2, 3].map(|at| sizes[at].1);
        t <= tk && hq.is_multiple_of(hkv)
    }

    #[test]
    fn the_nearest_problem_is_one_of_the_op() {
        let sizes = [("T", 33), ("TK", 40), ("HQ", 4), ("HKV", 2)];
        for (text, want) in [
            ("T = 64", Some([64, 64, 4, 2])),
            ("T = 65536", Some([65536, 65536, 4, 2])),
            ("T = 5000\n\"TK % 128\" = 0", Some([5000, 5120, 4, 2])),
            // Two query heads share a key head as before.
            ("HKV = 8", Some([33, 40, 16, 8])),
            ("HKV = 3", Some([33, 40, 6, 3])),
            ("HQ = 5", Some([33, 40, 5, 5])),
            ("HQ = 5\nHKV = '<= 4'", Some([33, 40, 5, 1])),
            ("HQ = 5\nT = 64", Some([64, 64, 5, 5])),
            ("HQ = 5\nHKV = 3", None),
            ("TK = 32", Some([32, 32, 4, 2])),
        ] {
            let found = read(text).unwrap().adapt(&sizes, Dtype::F32, &attention);
            let found = found.map(|(sizes, _)| [0, 1, 2, 3].map(|at| sizes[at].1));
            assert_eq!(found, want, "{text}");
        }
    }
}

//! What an engine is compared with: one tap of one prompt.

use golden::{compare::listed::Row, recording::Recording};
use ndarray::{Array2, Array3, Ix2, Ix3, s};

use super::read::{Part, Said};
use crate::{
    exit::{Exit, fail},
    logits::Prompt,
};

/// The reference's answers.
pub(crate) enum Want {
    /// `[B, T, V]`.
    Logits(Array3<f32>),
    /// The most likely tokens `[B, T, K]`, their logits, and the log of the sum of all `[B, T]`.
    Top { ids: Array3<i64>, logits: Array3<f32>, log_sums: Array2<f64> },
}

impl Want {
    /// Sequences and columns.
    pub(crate) fn dim(&self) -> (usize, usize) {
        match self {
            Want::Logits(x) => (x.dim().0, x.dim().1),
            Want::Top { log_sums, .. } => log_sums.dim(),
        }
    }

    /// Tokens there are, where that is known.
    pub(crate) fn vocabulary(&self) -> Option<usize> {
        match self {
            Want::Logits(x) => Some(x.dim().2),
            Want::Top { .. } => None,
        }
    }

    /// One row, and the mean square of its logits: of those that were recorded.
    pub(crate) fn row(&self, i: usize, column: usize) -> (Row, f64) {
        let mean_square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64;
        let wide = |x: &Array3<f32>| -> Vec<f64> {
            x.slice(s![i, column, ..]).iter().map(|&x| f64::from(x)).collect()
        };
        match self {
            Want::Logits(x) => {
                let row = wide(x);
                let scale = mean_square(&row);
                (Row::Logits(row), scale)
            }
            Want::Top { ids, logits, log_sums } => {
                let row = wide(logits);
                let scale = mean_square(&row);
                let ids = ids.slice(s![i, column, ..]);
                let log_sum = log_sums[[i, column]];
                let entries = ids.iter().zip(&row).map(|(&id, x)| (id as u32, x - log_sum));
                (Row::listed(entries.collect()), scale)
            }
        }
    }
}

/// One tap of one prompt.
pub(crate) struct Asked {
    /// The reference's answers.
    pub(crate) want: Want,
    /// Columns of padding before each sequence of the tap.
    pub(crate) padding: Vec<usize>,
    /// Per sequence and column the token that followed, where it is known.
    pub(crate) next: Vec<Vec<Option<u32>>>,
    /// The prompt, where it is known.
    pub(crate) prompt: Option<Prompt>,
    /// What was decoded after it.
    pub(crate) generated: Option<Array2<i64>>,
}

impl Asked {
    /// Of a recording; `None` where the tap was not recorded.
    pub(crate) fn recorded(
        recording: &Recording,
        id: &str,
        tap: &str,
    ) -> anyhow::Result<Option<Asked>> {
        let wrong = |e: &dyn std::fmt::Display| fail(Exit::Recording, e.to_string());
        let Some(prompt) = recording.manifest.prompts.iter().find(|prompt| prompt.id == id) else {
            return Ok(None);
        };
        let name = |tensor: &str| format!("{id}/{tensor}");
        let shaped = |name: &str, e: ndarray::ShapeError| {
            wrong(&format!("{}: tensor {name}: {e}", recording.dir.display()))
        };
        let floats = |tensor: &str| {
            let x = recording.f32(&name(tensor)).map_err(|e| wrong(&e))?;
            x.into_dimensionality::<Ix3>().map_err(|e| shaped(&name(tensor), e))
        };
        let want = if recording.get(&name(tap)).is_some() {
            Want::Logits(floats(tap)?)
        } else if tap == "logits" {
            let ids = recording.i64(&name("topk.ids")).map_err(|e| wrong(&e))?;
            let sums = recording.f64(&name("logsumexp")).map_err(|e| wrong(&e))?;
            Want::Top {
                ids: ids.into_dimensionality().map_err(|e| shaped(&name("topk.ids"), e))?,
                logits: floats("topk.logits")?,
                log_sums: sums.into_dimensionality().map_err(|e| shaped(&name("logsumexp"), e))?,
            }
        } else {
            return Ok(None);
        };
        let tokens = recording.tokens(prompt).map_err(|e| wrong(&e))?;
        let padding = tokens.iter().map(|row| prompt.tokens - row.len()).collect();
        let generated = match tap {
            "step_logits" => {
                let x = recording.i64(&name("generated")).map_err(|e| wrong(&e))?;
                Some(x.into_dimensionality::<Ix2>().map_err(|e| shaped(&name("generated"), e))?)
            }
            _ => None,
        };
        let prompt = Prompt { tokens, padding, columns: prompt.tokens };
        let asked = Asked::new(tap, want, Some(prompt), generated);
        asked.map(Some).map_err(|e| wrong(&format!("{}: {e}", recording.dir.display())))
    }

    /// Of another file; its prompt, or that of the engine's own file where it has none.
    pub(crate) fn said(file: &Part<'_>, got: &Part<'_>, tap: &str) -> anyhow::Result<Asked> {
        let Said::Logits(want) = file.said(tap)? else {
            return Err(file.wrong(format!(
                "tensor {}: missing: only whole rows can be compared with",
                file.name(tap)
            )));
        };
        let prompt = match file.prompt()? {
            None => got.prompt()?,
            prompt => prompt,
        };
        let generated = match file.integers("generated")? {
            None => got.integers("generated")?,
            generated => generated,
        };
        Asked::new(tap, Want::Logits(want), prompt, generated).map_err(|e| file.wrong(e))
    }

    /// What follows each row, and where rows begin.
    fn new(
        tap: &str,
        want: Want,
        prompt: Option<Prompt>,
        generated: Option<Array2<i64>>,
    ) -> Result<Asked, String> {
        let (b, t) = want.dim();
        // The MTP head reads a token and its successor, and says what follows that.
        let (short, ahead) = if tap == "mtp_logits" { (1, 2) } else { (0, 1) };
        let decoded = tap == "step_logits";
        if let Some(prompt) = &prompt {
            let columns = if decoded { t } else { prompt.columns.saturating_sub(short) };
            if (prompt.tokens.len(), columns) != (b, t) {
                return Err(format!(
                    "tensor input_ids: expected shape [{b}, {}], as {tap} beside it has, got [{}, {}]",
                    t + short,
                    prompt.tokens.len(),
                    prompt.columns
                ));
            }
        }
        if decoded
            && let Some(generated) = &generated
            && generated.dim() != (b, t.saturating_sub(1))
        {
            return Err(format!(
                "tensor generated: expected shape [{b}, {}], as step_logits has, got {:?}",
                t.saturating_sub(1),
                generated.shape()
            ));
        }
        let padding = match &prompt {
            Some(prompt) if !decoded => prompt.padding.clone(),
            _ => vec![0; b],
        };
        let next = (0..b)
            .map(|i| {
                let after = |column: usize| {
                    if decoded {
                        let id = generated.as_ref()?.get((i, column))?;
                        return u32::try_from(*id).ok();
                    }
                    let at = (column + ahead).checked_sub(padding[i])?;
                    prompt.as_ref()?.tokens[i].get(at).copied()
                };
                (0..t).map(after).collect()
            })
            .collect();
        Ok(Asked { want, padding, next, prompt, generated })
    }
}

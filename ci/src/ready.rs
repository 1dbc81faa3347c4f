//! Engines made ready: weights narrowed with a bar, or mapped from a file of such.

use std::{path::PathBuf, sync::Arc};

use benches::{Loading, Number, Store, StoreError};
use golden::{
    Engine, Narrow, Weights,
    engine::{INTERRUPTED, Narrowed},
};

use crate::{
    exit::{Exit, fail, of_engine, refuse},
    out::{self, Out},
};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Ready {
    /// Keep weights that the cpu engine narrows (int8, int4) in this file, and map them from it next time
    #[arg(long, value_name = "FILE", env = "KARAT_CACHE")]
    cache: Option<PathBuf>,
}

impl Ready {
    /// Where an engine that narrows weights will have them.
    pub(crate) fn narrowed(&self, engine: &str, number: &str) -> Narrowed {
        let narrows = engine == "cpu" && Narrow::of_number(number).is_some();
        if self.cache.is_some() && narrows { Narrowed::Mapped } else { Narrowed::Owned }
    }

    /// Refuses to keep several formats in one file.
    pub(crate) fn check(&self, numbers: &[String]) -> anyhow::Result<()> {
        let narrow = numbers.iter().filter_map(|number| Narrow::of_number(number)).count();
        if self.cache.is_some() && 1 < narrow {
            return Err(refuse(
                "--cache: one file holds one of int8 and int4, ask for one of them",
            ));
        }
        Ok(())
    }

    /// An engine, with a bar while its weights are narrowed.
    ///
    /// # Errors
    /// If there is none, Ctrl-C is pressed, or the file cannot be had.
    pub(crate) fn engine(
        &self,
        engine: &str,
        number: Number<'_>,
        weights: &Arc<dyn Weights>,
        out: &Out,
    ) -> anyhow::Result<Box<dyn Engine>> {
        let name = number.name;
        let bar = out.bar(0, &format!("weights in {name}"), true);
        let mut tell = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            !out::interrupted()
        };
        let mut store = None;
        if let Some(path) = &self.cache {
            if self.narrowed(engine, name) == Narrowed::Mapped {
                let mut note = |line: &str| out.note(&format!("karat: {line}"));
                let ready = Store::ready(path, &**weights, name, &mut tell, &mut note);
                store = Some(ready.map_err(|e| match e {
                    StoreError::Io(line) => fail(Exit::Unfit, line),
                    StoreError::Interrupted => fail(Exit::Interrupted, INTERRUPTED),
                    StoreError::Foreign(line) | StoreError::Weights(line) => refuse(line),
                })?);
            } else {
                out.note(&format!("--cache: {engine} in {name} narrows nothing"));
            }
        }
        let mut loading = Loading { tell: &mut tell, store: store.as_ref() };
        let ready = benches::engine_with(engine, number, weights.clone(), None, &mut loading);
        bar.finish_and_clear();
        let ready = ready.map_err(|e| match e.to_string() {
            line if line == INTERRUPTED => fail(Exit::Interrupted, line),
            _ => of_engine(&e),
        })?;
        if let Some(why) = ready.falls_back() {
            out.note(&format!("karat: {engine} in {name}: portable kernels compute: {why}"));
        }
        Ok(ready)
    }
}

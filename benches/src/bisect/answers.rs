//! Answers that an engine gave elsewhere, as an engine that knows nothing else.

use golden::{
    Config, Engine, Error, Plan,
    engine::{LinearState, Listener, Routing, Snapshot, Step, Want},
};
use ndarray::Array2;

/// What was said of one text, all sequences one after another, `N` tokens in all.
#[derive(Clone, Debug)]
pub struct Answers {
    /// Who said it, or where it is from.
    pub name: String,
    /// How it rounds.
    pub plan: Plan,
    /// The model.
    pub config: Config,
    /// The text.
    pub tokens: Vec<Vec<u32>>,
    /// `[N, D]` each: the embedding, the residual stream after each layer but the last, the last hidden state
    /// after the final norm.
    pub hidden: Vec<Array2<f32>>,
    /// `[N, A]` experts of each layer; `None` of one that is dense.
    pub experts: Vec<Option<Array2<i64>>>,
    /// `[N, V]`.
    pub logits: Array2<f32>,
}

impl Answers {
    /// The choices of experts, as a step is told to take them.
    pub(super) fn routing(&self) -> Vec<Vec<Option<Array2<i64>>>> {
        vec![self.experts.clone()]
    }

    fn cannot(&self) -> Error {
        format!("{}: answers of a file can be asked for nothing else", self.name).into()
    }
}

impl Engine for Answers {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn plan(&self) -> Plan {
        self.plan.clone()
    }

    fn reset(&mut self, _sequences: usize) -> Result<(), Error> {
        Ok(())
    }

    fn lengths(&self) -> Vec<usize> {
        self.tokens.iter().map(Vec::len).collect()
    }

    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        if tokens != self.tokens || want.forced.is_some() {
            return Err(self.cannot());
        }
        let routing = |ids: &Option<Array2<i64>>| {
            ids.clone().map(|ids| Routing { margins: vec![f32::NAN; ids.nrows()], ids })
        };
        Ok(Step {
            logits: self.logits.clone(),
            hidden: self.hidden.clone(),
            routing: self.experts.iter().map(routing).collect(),
            ..Step::default()
        })
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Err(self.cannot())
    }

    fn restore(&mut self, _snapshot: Snapshot) -> Result<(), Error> {
        Err(self.cannot())
    }

    fn release(&mut self, _snapshot: Snapshot) {}

    fn rollback(&mut self, _keep: &[usize]) -> Result<(), Error> {
        Err(self.cannot())
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        Err(self.cannot())
    }

    fn watch(&mut self, _listener: Listener) {}

    fn has_mtp(&self) -> bool {
        false
    }

    fn mtp(&mut self, _tokens: &[Vec<u32>], _hidden: &Array2<f32>) -> Result<Step, Error> {
        Err(self.cannot())
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        Vec::new()
    }

    fn mtp_truncate(&mut self, _keep: &[usize]) -> Result<(), Error> {
        Err(self.cannot())
    }
}

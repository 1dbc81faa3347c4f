//! Faults in the keeping of states, planted around any engine: what each path is there to catch.
//!
//! The wiring faults of the reference spoil what a layer is handed; these spoil what happens between
//! steps.

use std::collections::HashMap;

use golden::{
    Claims, Config, Engine, Error, Plan, Plant,
    engine::{LinearState, Listener, Snapshot, Step, Want},
};
use ndarray::Array2;

/// Every fault.
pub const FAULTS: &[Plant] = &[
    Plant {
        name: "drafts-kept",
        what: "drafts that were refused stay in the states",
        cite: "https://github.com/vllm-project/vllm/issues/43559",
    },
    Plant {
        name: "accepted-off-by-one",
        what: "of the accepted drafts the last one is taken back too",
        cite: "https://github.com/vllm-project/vllm/issues/39273",
    },
    Plant {
        name: "short-prompt-is-a-draft",
        what: "a prompt of up to five tokens with speculation on is taken for a step of drafts, and leaves no state",
        cite: "https://github.com/vllm-project/vllm/issues/53051",
    },
    Plant {
        name: "snapshot-is-now",
        what: "going back to a snapshot changes nothing",
        cite: "https://github.com/vllm-project/vllm/issues/43650",
    },
    Plant {
        name: "slots-close-up",
        what: "where a sequence is fed nothing, the ones after it move into its slot",
        cite: "https://github.com/vllm-project/vllm/issues/28202",
    },
    Plant {
        name: "slot-not-cleared",
        what: "a reset to as many sequences keeps their states",
        cite: "https://github.com/vllm-project/vllm/issues/55766",
    },
    Plant {
        name: "draft-cache-kept",
        what: "the draft head's cache keeps what was cut off",
        cite: "https://github.com/ml-explore/mlx-lm/issues/846",
    },
    Plant {
        name: "places-swapped",
        what: "in a batch the logits of two sequences change places",
        cite: "https://github.com/vllm-project/vllm/issues/28182",
    },
    Plant {
        name: "bits-by-batch",
        what: "in a batch every logit is off by one unit in the last place, though batch invariance is claimed",
        cite: "https://github.com/vllm-project/vllm/issues/42960",
    },
    Plant {
        name: "choice-of-the-neighbour",
        what: "in a batch each sequence is given the token that was chosen for the next one",
        cite: "https://github.com/vllm-project/vllm/issues/28182",
    },
    Plant {
        name: "bits-by-run",
        what: "every third step the last logit is off by one unit in the last place, though equal runs are claimed",
        cite: "https://github.com/sgl-project/sglang/issues/27869",
    },
];

/// Whether there is such a fault.
pub(super) fn known(name: &str) -> bool {
    FAULTS.iter().any(|fault| fault.name == name)
}

/// An engine with one of [`FAULTS`]. It counts tokens as if there were none: what is wrong are the
/// states.
pub(super) struct Faulty {
    inner: Box<dyn Engine>,
    fault: String,
    held: Vec<usize>,
    /// Tokens of each sequence before the last step.
    before: Vec<usize>,
    snapshots: HashMap<Snapshot, Vec<usize>>,
    drafts_held: Vec<usize>,
    steps: usize,
}

impl Faulty {
    pub(super) fn new(inner: Box<dyn Engine>, fault: &str) -> Faulty {
        Faulty {
            inner,
            fault: fault.to_owned(),
            held: Vec::new(),
            before: Vec::new(),
            snapshots: HashMap::new(),
            drafts_held: Vec::new(),
            steps: 0,
        }
    }

    fn is(&self, name: &str) -> bool {
        self.fault == name
    }

    fn step(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        if self.is("slots-close-up") && tokens.iter().any(Vec::is_empty) {
            let mut closed: Vec<_> = tokens.iter().filter(|row| !row.is_empty()).cloned().collect();
            closed.resize(tokens.len(), Vec::new());
            return self.inner.forward(&closed, want);
        }
        let fresh = self.held.iter().all(|&held| held == 0);
        let short = tokens.iter().all(|row| row.len() <= 5);
        if self.is("short-prompt-is-a-draft") && fresh && short && want.rollback {
            let step = self.inner.forward(tokens, want)?;
            self.inner.rollback(&vec![0; tokens.len()])?;
            return Ok(step);
        }
        self.inner.forward(tokens, want)
    }

    /// What a fault makes of the logits of a step.
    fn spoil(&self, tokens: &[Vec<u32>], logits: &mut Array2<f32>) {
        let up = |x: &mut f32| *x = f32::from_bits(x.to_bits() + 1);
        let rows: usize = tokens.iter().map(Vec::len).sum();
        if logits.nrows() != rows || logits.is_empty() {
            return;
        }
        match (self.fault.as_str(), tokens) {
            ("bits-by-batch", [_, _, ..]) => logits.iter_mut().for_each(up),
            ("bits-by-run", _) if self.steps.is_multiple_of(3) => {
                // The last one that is looked at: the logit of garbage may itself be garbage.
                let (row, column) = (rows - 1, logits.ncols() - 2);
                up(&mut logits[[row, column]]);
            }
            ("places-swapped", [first, second, ..]) if first.len() == second.len() => {
                for i in 0..first.len() {
                    let row = logits.row(i).to_owned();
                    let other = logits.row(first.len() + i).to_owned();
                    logits.row_mut(i).assign(&other);
                    logits.row_mut(first.len() + i).assign(&row);
                }
            }
            _ => {}
        }
    }
}

impl Engine for Faulty {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn config(&self) -> &Config {
        self.inner.config()
    }

    fn plan(&self) -> Plan {
        self.inner.plan()
    }

    fn claims(&self) -> Claims {
        self.inner.claims()
    }

    fn chooses(&self) -> bool {
        self.inner.chooses()
    }

    fn reset(&mut self, sequences: usize) -> Result<(), Error> {
        let as_many = self.held.len() == sequences;
        self.held = vec![0; sequences];
        self.drafts_held = vec![0; sequences];
        if self.is("slot-not-cleared") && as_many { Ok(()) } else { self.inner.reset(sequences) }
    }

    fn lengths(&self) -> Vec<usize> {
        self.held.clone()
    }

    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        let mut step = self.step(tokens, want)?;
        if self.is("choice-of-the-neighbour") && 1 < step.greedy.len() {
            step.greedy.rotate_left(1);
        }
        self.steps += 1;
        self.spoil(tokens, &mut step.logits);
        self.before.clone_from(&self.held);
        self.held.iter_mut().zip(tokens).for_each(|(held, row)| *held += row.len());
        Ok(step)
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let snapshot = self.inner.snapshot()?;
        self.snapshots.insert(snapshot, self.held.clone());
        Ok(snapshot)
    }

    fn restore(&mut self, snapshot: Snapshot) -> Result<(), Error> {
        self.held = self.snapshots.get(&snapshot).ok_or("no such snapshot")?.clone();
        if self.is("snapshot-is-now") { Ok(()) } else { self.inner.restore(snapshot) }
    }

    fn release(&mut self, snapshot: Snapshot) {
        self.snapshots.remove(&snapshot);
        self.inner.release(snapshot);
    }

    fn rollback(&mut self, keep: &[usize]) -> Result<(), Error> {
        let fresh = self.before.iter().all(|&held| held == 0);
        self.held = self.before.iter().zip(keep).map(|(before, keep)| before + keep).collect();
        match self.fault.as_str() {
            "drafts-kept" => Ok(()),
            // Everything was taken back at once.
            "short-prompt-is-a-draft" if fresh => Ok(()),
            "accepted-off-by-one" => {
                let less: Vec<usize> = keep.iter().map(|keep| keep.saturating_sub(1)).collect();
                self.inner.rollback(&less)
            }
            _ => self.inner.rollback(keep),
        }
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        self.inner.linear_states()
    }

    fn watch(&mut self, listener: Listener) {
        self.inner.watch(listener);
    }

    fn has_mtp(&self) -> bool {
        self.inner.has_mtp()
    }

    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error> {
        self.drafts_held.iter_mut().zip(tokens).for_each(|(held, row)| *held += row.len());
        self.inner.mtp(tokens, hidden)
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        self.drafts_held.clone()
    }

    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error> {
        self.drafts_held = keep.to_vec();
        if self.is("draft-cache-kept") { Ok(()) } else { self.inner.mtp_truncate(keep) }
    }
}

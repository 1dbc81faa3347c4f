//! Recorded cases of ops: the plain reference against what the official functions said.

use golden::{
    compare::{self, Finding},
    recording::{OpCase, Recorded, Recording},
    tensor::{Read, Source},
};

use super::{Bench, Candidate};
use crate::{
    answer::Answer,
    evidence::Evidence,
    sabotage::{self, Spoil},
    verify::Rule,
};

impl<O: Answer> Bench<O> {
    pub(super) fn recorded_findings(
        &self,
        recording: &Recording,
        case: &OpCase,
        variant: &str,
        plant: Option<Spoil>,
        keep: &mut Evidence,
    ) -> Result<Vec<Finding>, String> {
        let inputs: O::Inputs<f32> = Read::read(&RecordedCase { recording, case })?;
        keep.add("in", &inputs);
        let mut got = match self.candidate(variant)? {
            Candidate::Reference(form) => O::answer::<f32>(&inputs, form, None),
            _ => return Err(format!("{variant} is no form of the reference")),
        };
        sabotage::all(&mut got, plant);
        keep.add("got", &got);
        let prefix = format!("{}/{}", O::NAME, case.case);
        let mut findings = Vec::new();
        for (name, got) in golden::Tensors::tensors(&got) {
            let want = match recording.get(&format!("{prefix}/out.{name}")) {
                Some(Recorded::F32(x)) => x.map(|&x| f64::from(x)),
                Some(Recorded::I64(x)) => x.map(|&x| x as f64),
                // What the official function does not return cannot be compared.
                _ => continue,
            };
            keep.one("want", name, Recorded::F64(want.clone()));
            let bound = Rule::F32.bound(recording.noise(&format!("{prefix}/{name}"), "f64"));
            let exact = matches!(got, golden::View::I64(_));
            let bound = if exact { compare::Bound::Exact } else { bound };
            findings.push(compare::views(name, &golden::View::F64(want.view()), &got, bound));
        }
        if findings.is_empty() {
            Err("no output of this op was recorded".to_owned())
        } else {
            Ok(findings)
        }
    }
}

/// A recorded case as a source of inputs.
struct RecordedCase<'a> {
    recording: &'a Recording,
    case: &'a OpCase,
}

impl Source for RecordedCase<'_> {
    fn tensor(&self, name: &str) -> Option<Recorded> {
        self.recording.get(&format!("{}/{}/in.{name}", self.case.op, self.case.case))
    }

    fn scalar(&self, name: &str) -> Option<f64> {
        self.case.scalars.get(name).copied()
    }
}

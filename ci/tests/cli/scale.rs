//! How time and memory grow with the context, and what the machine does at most.

use super::home::Home;

const MODEL: [&str; 3] = ["scale", "--model", "synthetic:tiny"];
const SHORT: [&str; 4] = ["--rounds", "2", "--tokens", "2"];

#[test]
fn contexts_are_measured_and_fitted() {
    let home = Home::new();
    let asked = ["--context", "3k,1k,2048,0,1024", "--format", "jsonl", "--number", "bf16,int8"];
    let ran = home.karat(&[&MODEL[..], &SHORT, &asked].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines = ran.lines();
    assert_eq!(lines.len(), 2);
    for (line, number) in lines.iter().zip(["bf16", "int8"]) {
        let said = ["kind", "number", "part", "kv_cache"].map(|key| line[key].as_str().unwrap());
        assert_eq!(said, ["scale", number, "model", "bf16"]);
        let points = line["points"].as_array().unwrap();
        let contexts: Vec<_> = points.iter().map(|p| p["context"].as_u64().unwrap()).collect();
        assert_eq!(contexts, [0, 1024, 2048, 3072]);
        let states: Vec<_> = points.iter().map(|p| p["state_bytes"].as_u64().unwrap()).collect();
        assert!(states.is_sorted_by(|a, b| a < b), "a page more each: {states:?}");
        for point in points {
            let rounds = point["samples_ns"].as_array().unwrap();
            let two = |round: &serde_json::Value| round.as_array().unwrap().len() == 2;
            assert!(rounds.len() == 2 && rounds.iter().all(two), "{point}");
            let of_state = point["state_bytes"].as_u64().unwrap();
            assert!(0.0 < point["ms_per_token"].as_f64().unwrap());
            assert!(point["memory_bytes"].as_u64().is_none_or(|held| of_state < held), "{point}");
        }
        let fit = &line["fit"];
        for key in ["a", "b", "c", "residual", "expected_b", "expected_b_of_products"] {
            assert!(fit[key].is_number(), "{key}: {fit}");
        }
        assert!(["a", "b", "c"].iter().all(|key| fit["errors"][key].is_number()), "{fit}");
        assert!(fit["line"]["errors"]["b"].is_number(), "{fit}");
        assert!(line["b_over_least"]["error"].is_number(), "{line}");
        assert!(line["cliffs"].is_null() && line["refused"] == serde_json::json!([]), "{line}");
    }
    // As many as it takes to tell a cliff; on a busy machine there may be one.
    let asked = ["--context", "0,200,400,600,800,1000", "--format", "jsonl"];
    let ran = home.karat(&[&MODEL[..], &SHORT, &asked].concat());
    let cliffs = ran.lines()[0]["cliffs"].as_array().unwrap().len();
    assert_eq!(ran.code, if cliffs == 0 { 0 } else { 5 }, "{}", ran.err);
}

#[test]
fn layers_are_asked_alone() {
    let home = Home::new();
    let asked = ["--layers", "--context", "0,1k,2k", "--device", "cpu"];
    let ran = home.karat(&[&MODEL[..], &SHORT, &asked, &["--format", "jsonl"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines = ran.lines();
    let parts: Vec<_> = lines.iter().map(|line| (&line["part"], &line["layer"])).collect();
    let want = [("attention layer", 3), ("gdn layer", 0)].map(|(name, i)| (name.into(), i.into()));
    assert_eq!(parts, want.each_ref().map(|(name, i): &(serde_json::Value, _)| (name, i)));
    let grown = |line: &serde_json::Value| line["fit"]["expected_b"].as_f64().unwrap();
    assert!(0.0 < grown(&lines[0]) && grown(&lines[1]) == 0.0, "{lines:?}");
    assert!(lines[0]["b_over_least"]["of"].is_number() && lines[1]["b_over_least"].is_null());
    let states = |line: &serde_json::Value, i: usize| line["points"][i]["state_bytes"].clone();
    assert_eq!(states(&lines[1], 0), states(&lines[1], 2));
    let ran = home.karat(&[&MODEL[..], &SHORT, &asked].concat());
    assert!(ran.out.contains("attention layer 3") && ran.out.contains("as a line"), "{}", ran.out);
    home.says(2, &[&MODEL[..], &["--layers", "--cache", "file"]].concat(), &["--help"]);
}

#[test]
fn what_does_not_fit_is_said_and_the_rest_goes_on() {
    let home = Home::new();
    let asked = ["--context", "1k,99999M", "--format", "jsonl"];
    let ran = home.karat(&[&MODEL[..], &SHORT, &asked].concat());
    assert_eq!(ran.code, 9, "{}", ran.err);
    assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    for word in ["cpu in bf16", "context 99999M", "available", "left out"] {
        assert!(ran.err.contains(word), "{word}: {}", ran.err);
    }
    let line = &ran.lines()[0];
    assert_eq!(line["points"].as_array().unwrap().len(), 1);
    assert_eq!(line["refused"][0]["context"], 99999_u64 << 20);
    assert!(line["fit"].is_null() && line["cliffs"].is_null());
    let none = [&MODEL[..], &["--context", "99999M"]].concat();
    home.says(9, &none, &["no context fits"]);
    home.says(2, &[&MODEL[..], &["--number", "f31"]].concat(), &["f31", "bf16"]);
    home.says(2, &["scale", "--model", "nowhere"], &["nowhere"]);
    let ran = home.karat(&[&MODEL[..], &["--context", "1.5k"]].concat());
    assert!(ran.code == 2 && ran.err.contains("4096, 4k, 1M"), "{}", ran.err);
}

/// What the machine does at most is kept where others find it.
#[test]
fn ceilings_are_measured_and_kept() {
    let home = Home::with(&[]);
    let inspect = ["inspect", "--model", "synthetic:tiny", "--here"];
    home.says(7, &inspect, &["ceilings", "karat doctor --measure"]);
    assert!(home.karat(&["doctor"]).out.contains("not measured"));
    let ran = home.karat(&["doctor", "--measure", "--rounds", "1", "--format", "jsonl"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines = ran.lines();
    let kinds: Vec<_> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["env", "ceilings"]);
    let of: Vec<_> = lines[1]["ceilings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["device"] == "cpu")
        .map(|one| one["of"].as_str().unwrap())
        .collect();
    assert_eq!(of, ["read", "copy", "change", "f32", "bf16", "int16", "int8"]);
    assert!(home.karat(&["doctor"]).out.contains("GB/s read"));
    let ran = home.karat(&[&inspect[..], &["--format", "jsonl"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let limits = &ran.lines()[0]["limits"];
    assert!(0.0 < limits["decode_tokens_per_s"].as_f64().unwrap(), "{limits}");
    // A file that is none is none.
    let folder = home.path("target/karat/ceilings");
    let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&file, "{").unwrap();
    home.says(7, &inspect, &["karat doctor --measure"]);
    home.says(2, &[&inspect[..], &["--bandwidth", "3"]].concat(), &["--help"]);
}

//! The report, and what other tools read.

use std::fs;

use serde_json::{Value, json};

use super::home::Home;

fn read(home: &Home, file: &str) -> String {
    fs::read_to_string(home.path(file)).unwrap()
}

/// Rows of every kind that reports are made of, as commands write them.
fn everything(home: &Home) {
    home.ends(0, &["check", "l2_norm/", "--results", "check.jsonl"]);
    home.ends(0, &["golden", "verify", "decode", "--results", "golden.jsonl"]);
    let bisect = ["bisect", "--plant", "yarn-scale-dropped", "--results", "bisect.jsonl"];
    assert!([0, 3].contains(&home.karat(&bisect).code));
    let head = read(home, "check.jsonl").lines().next().unwrap().to_owned();
    let mut rows = vec![serde_json::from_str::<Value>(&head).unwrap()];
    rows[0]["run"] = json!("times");
    let row = |kind: &str, more: Value| {
        let mut row = json!({"schema": "karat.result/1", "kind": kind});
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    for (i, (variant, roof)) in
        [("cpu/avx2", "memory"), ("cpu/avx512", "products")].into_iter().enumerate()
    {
        let samples: Vec<f64> = (0..30).map(|k| 2000.0 + f64::from(k * (i as i32 + 1))).collect();
        rows.push(row("bench", json!({
            "case": format!("linear/N4-M64-D64@{variant}"), "op": "linear", "variant": variant, "samples_ns": samples,
            "median_ns": 2000.0, "bytes": 16384, "flops": 32768 * (1 + 30 * i), "share_of_roof": 0.25 + 0.5 * i as f64,
            "roof": roof, "cold": false, "checked": "passed",
        })));
    }
    for depth in [0, 4096, 65536] {
        let pace = 30.0 - f64::from(depth) / 1e4;
        let samples = json!({"min": pace - 1.0, "median": pace, "max": pace + 1.0});
        rows.push(row("bench", json!({
            "model": "synthetic:slice", "engine": "cpu in bf16", "kv_cache": "bf16", "depth": depth, "fed": false, "prefill": 512, "decode": 64,
            "prefill_tokens_per_second": samples, "decode_tokens_per_second": samples,
            "prefill_samples": [pace - 1.0, pace, pace + 1.0], "decode_samples": [pace, pace + 0.5],
            "memory_needed": {"mapped": 1, "owned": 2, "state": 1_000_000, "cache": depth * 2048, "scratch": 3},
            "peak_rss_bytes": 4_000_000_000_u64,
        })));
    }
    let many = json!({"min": 50.0, "median": 60.0, "max": 61.0});
    rows.push(row("bench", json!({
        "model": "synthetic:slice", "engine": "cpu in bf16", "batch": 8, "depth": 0, "fed": false, "prefill": 512, "decode": 64,
        "decode_tokens_per_second": many, "decode_samples": [60.0],
    })));
    rows.push(row("bench_fit", json!({"engine": "cpu in bf16", "kv_cache": "bf16", "depths": 3, "seconds_at_none": 0.033, "seconds_per_token": 1e-7})));
    let points: Vec<Value> = [0, 1024, 16384].map(|context| json!({
        "context": context, "ms_per_token": 20.0 + f64::from(context) * 1e-4, "samples_ns": [[2e7]], "memory_bytes": 5e8, "state_bytes": 1e6,
    })).to_vec();
    rows.push(row("scale", json!({"model": "synthetic:slice", "engine": "cpu in int8", "number": "int8", "points": points,
        "part": "model", "fit": {"a": 0.02, "b": 1e-7, "c": 0.0, "errors": {"a": 1e-4}, "exponent": 1.0, "residual": 0.01}, "cliffs": []})));
    rows.push(row(
        "gate",
        json!({"case": "linear/N4-M64-D64@cpu/avx2", "variant": "cpu/avx2", "verdict": "slower",
        "ratio": 1.08, "lo": 1.05, "hi": 1.11, "floor": 0.01, "reason": "5 % more work"}),
    ));
    rows.push(row("mutant", json!({"mutant": "linear@cpu/avx2+tail", "what": "the tail <is> dropped", "cite": "it#1", "killed": false})));
    rows.push(row("mutate", json!({"planted": 20, "killed": 19, "survivors": ["linear@cpu/avx2+tail"], "honest": 100, "false_alarms": 0})));
    rows.push(row("end", json!({"command": "bench", "exit": 5, "line": null, "seconds": 1.0})));
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(home.path("times.jsonl"), lines.join("\n") + "\n").unwrap();
}

#[test]
fn a_report_is_one_file_that_asks_nobody() {
    let home = Home::with(&["ops", "decode"]);
    everything(&home);
    let files = ["check.jsonl", "golden.jsonl", "bisect.jsonl", "times.jsonl"];
    let args = [&["report"][..], &files, &["-o", "r.html", "--badge", "b.svg", "-q"]].concat();
    home.ends(0, &args);
    let page = read(&home, "r.html");
    assert!(page.len() < 2 << 20, "{} bytes", page.len());
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    for never in ["<script", "src=", "@import", "url(", "javascript:", " onclick", "<iframe"] {
        assert!(!page.contains(never), "{never}");
    }
    // The only addresses are names of namespaces, and nothing is fetched from those.
    let addresses = page.matches("http").count();
    assert_eq!(
        addresses,
        page.matches("http://www.w3.org/2000/svg").count() + page.matches("http-equiv").count()
    );
    assert!(
        page.contains("default-src 'none'")
            && page.contains("prefers-color-scheme:dark")
            && page.contains("@media print")
    );
    // Every section, and in each what it is there for.
    for said in [
        "karat check 'l2_norm/",
        "worst use of a bound",
        "19 of 20",
        "the tail &lt;is&gt; dropped",
        "Roofline: ",
        "roof: memory ",
        "Gop/s",
        "tokens/s",
        "Tokens one by one against context",
        "Memory of states against context",
        "Error budget by layer",
        "share of the bound, %",
        "Error walk",
        "5 % more work",
        "2000 2001 2002",
        "fingerprint",
        "Method",
        "best share of roof",
        "context, tokens",
    ] {
        assert!(page.contains(said), "{said}");
    }
    // Links lead somewhere.
    for (at, _) in page.match_indices("href=\"#") {
        let name = page[at + 7..].split('"').next().unwrap();
        assert!(page.contains(&format!("id=\"{name}\"")), "{name}");
    }
    assert!(read(&home, "b.svg").contains("<svg") && read(&home, "b.svg").contains("failed"));
    // The same from standard input.
    let mut command = home.command(&["report", "-", "-o", "stdin.html"]);
    let ran = home.run(command.stdin(fs::File::open(home.path("check.jsonl")).unwrap()));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(read(&home, "stdin.html").contains("karat: <span class=\"good\">passed"));
}

/// A hundred thousand cases; what is wrong among them is told, and the file stays small.
#[test]
fn many_cases_are_counted_and_the_wrong_ones_shown() {
    let home = Home::with(&["ops"]);
    home.ends(0, &["check", "l2_norm/", "--results", "r.jsonl"]);
    let text = read(&home, "r.jsonl");
    let lines: Vec<&str> = text.lines().collect();
    let row = lines.iter().find(|line| line.contains("\"outcome\":\"passed\"")).unwrap();
    let mut many = format!("{}\n", lines[0]);
    let case: Value = serde_json::from_str(row).unwrap();
    let case = case["case"].as_str().unwrap();
    for i in 0..20_000 {
        let outcome = if i % 5000 == 4999 { "\"failed\"" } else { "\"passed\"" };
        let name = case.replace('@', &format!(";seed={i}@"));
        many += &row.replace(case, &name).replace("\"passed\"", outcome);
        many += "\n";
    }
    many += lines[lines.len() - 1];
    fs::write(home.path("many.jsonl"), many).unwrap();
    home.ends(0, &["report", "many.jsonl", "-o", "many.html"]);
    let page = read(&home, "many.html");
    assert!(page.len() < 2 << 20, "{} bytes", page.len());
    assert!(
        page.contains("20000") && page.contains("cases are counted above and not shown one by one")
    );
    for i in [4999, 9999, 14999, 19999] {
        assert!(page.contains(&format!(";seed={i}@")), "{i}");
    }
    let ran = home.karat(&["export", "many.jsonl", "--to", "github"]);
    assert_eq!(ran.out.lines().count(), 4, "{}", ran.out);
}

#[test]
fn exports_are_what_other_tools_read() {
    let home = Home::with(&["ops", "decode"]);
    everything(&home);
    home.ends(3, &["check", "l2_norm/", "--plant", "nan", "--results", "bad.jsonl"]);
    let export = |file: &str, to: &str| {
        let ran = home.karat(&["export", file, "--to", to]);
        assert_eq!(ran.code, 0, "{to}: {ran:?}");
        ran.out
    };
    let junit = export("bad.jsonl", "junit");
    let report = quick_junit::Report::deserialize_from_str(&junit).unwrap();
    assert!(
        0 < report.failures
            && report.test_suites.iter().any(|suite| suite.name.as_str() == "check.l2_norm")
    );
    assert!(
        junit.contains("repro: karat check 'l2_norm/")
            || junit.contains("repro: karat check &apos;l2_norm/"),
        "{junit}"
    );
    let rows = read(&home, "bad.jsonl").matches("\"kind\":\"check\"").count();
    assert_eq!(report.tests, rows);
    // Ten annotations at most, each on one line, the last of which says how many are left out.
    let annotations = export("bad.jsonl", "github");
    let lines: Vec<&str> = annotations.lines().collect();
    assert_eq!(lines.len(), 10, "{annotations}");
    assert!(lines.iter().all(|line| line.starts_with("::error ")), "{annotations}");
    assert!(lines[9].contains("more are in the summary"), "{annotations}");
    let markdown = export("bad.jsonl", "markdown");
    assert!(
        markdown.starts_with("<!-- karat -->\n### ❌ karat: failed") && markdown.len() < 65_536,
        "{markdown}"
    );
    let badge = export("check.jsonl", "badge");
    assert!(badge.contains("passed") && badge.starts_with("<svg"), "{badge}");
    let bmf: Value = serde_json::from_str(&export("times.jsonl", "bmf")).unwrap();
    assert_eq!(
        bmf["linear/N4-M64-D64@cpu/avx2"]["latency"],
        json!({"value": 2000.0, "lower_value": 2000.0, "upper_value": 2029.0})
    );
    let action: Value =
        serde_json::from_str(&export("times.jsonl", "github-action-benchmark")).unwrap();
    let action = action.as_array().unwrap();
    assert!(action.iter().all(|entry| entry["unit"] == "ns"
        && entry["name"].is_string()
        && 0.0 < entry["value"].as_f64().unwrap()));
    assert!(
        action
            .iter()
            .any(|entry| entry["name"] == "model/decode/synthetic:slice/cpu in bf16 kv=bf16@4096")
    );
    let llama = export("times.jsonl", "llama-bench");
    let llama: Vec<Value> = llama.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(llama.len(), 6);
    assert_eq!(
        (&llama[0]["n_prompt"], &llama[0]["n_gen"], &llama[0]["avg_ts"]),
        (&json!(512), &json!(0), &json!(30.0))
    );
    let samples = llama[0]["samples_ns"].as_array().unwrap();
    assert!(
        samples.len() == 3 && (samples[1].as_f64().unwrap() - 512e9 / 30.0).abs() < 1.0,
        "{samples:?}"
    );
    // Criterion: a folder for each case; a second baseline stands beside the first.
    for baseline in ["old", "new"] {
        home.ends(
            0,
            &[
                "export",
                "times.jsonl",
                "--to",
                "criterion",
                "-o",
                "c",
                "--baseline",
                baseline,
                "-q",
            ],
        );
    }
    let folder = home.names("c/criterion").into_iter().find(|name| name.contains("avx2")).unwrap();
    assert_eq!(home.names(&format!("c/criterion/{folder}")), ["new", "old"]);
    let file = |name: &str| -> Value {
        serde_json::from_str(&read(&home, &format!("c/criterion/{folder}/new/{name}"))).unwrap()
    };
    let (benchmark, estimates) = (file("benchmark.json"), file("estimates.json"));
    assert_eq!(benchmark["full_id"], "linear/N4-M64-D64@cpu/avx2");
    assert_eq!(estimates["median"]["point_estimate"], 2014.5);
    let interval = &estimates["mean"]["confidence_interval"];
    assert!(
        interval["lower_bound"].as_f64() < Some(2014.5)
            && Some(2014.5) < interval["upper_bound"].as_f64(),
        "{interval}"
    );
    assert_eq!(file("sample.json")["times"].as_array().unwrap().len(), 30);
    assert_eq!(home.names("c"), ["criterion"]);
    // Nothing to make one of, and no place to put it.
    home.says(4, &["export", "check.jsonl", "--to", "bmf"], &["no row has a time"]);
    home.says(4, &["export", "check.jsonl", "--to", "criterion", "-o", "c"], &["samples"]);
    home.says(2, &["export", "times.jsonl", "--to", "criterion"], &["--out DIR"]);
    home.says(
        2,
        &["export", "times.jsonl", "--to", "criterion", "-o", "c", "--baseline", "../x"],
        &["--baseline"],
    );
    home.says(9, &["export", "times.jsonl", "--to", "criterion", "-o", "/proc/no"], &["/proc/no"]);
}

#[test]
fn a_check_tells_others_as_it_ends() {
    let home = Home::with(&["ops"]);
    let args = [
        "check",
        "l2_norm/",
        "--plant",
        "zeros",
        "--junit",
        "j.xml",
        "--github",
        "--summary",
        "s.md",
        "--badge",
        "b.svg",
        "--report",
        "r.html",
    ];
    let mut command = home.command(&args);
    let ran = home.run(command.env("GITHUB_STEP_SUMMARY", home.path("step.md")));
    assert_eq!(ran.code, 3, "{ran:?}");
    assert_eq!(ran.err.lines().filter(|line| line.starts_with("::error ")).count(), 10, "{ran:?}");
    assert!(!ran.out.contains("::error"), "{ran:?}");
    assert!(quick_junit::Report::deserialize_from_str(&read(&home, "j.xml")).unwrap().failures > 0);
    assert_eq!(read(&home, "step.md"), read(&home, "s.md"));
    assert!(read(&home, "b.svg").contains("wrong"));
    let page = read(&home, "r.html");
    assert!(page.contains("--plant zeros") && page.contains("<span class=\"bad\">failed"));
    // What is told beside the answer leaves its rows alone.
    let plain = home.karat(&["check", "l2_norm/", "--format", "jsonl"]);
    let told = home.karat(&["check", "l2_norm/", "--format", "jsonl", "--junit", "j.xml"]);
    assert_eq!((plain.code, plain.lines().len()), (told.code, told.lines().len()));
}

/// Not rows that were made up here: what commands write is what others read.
#[test]
fn what_commands_write_is_read() {
    let home = Home::with(&[]);
    let case = "rms_norm/N16-D64@cpu/portable";
    let scale = "scale --model synthetic:tiny --rounds 2 --tokens 2 --context 1k,2k,4k";
    let bench = format!("bench {case} --turns 2");
    for (file, line) in [("bench.jsonl", bench.as_str()), ("scale.jsonl", scale)] {
        let args: Vec<&str> = line.split(' ').chain(["--results", file]).collect();
        home.ends(0, &args);
    }
    let both = ["bench.jsonl", "scale.jsonl"];
    home.ends(0, &[&["merge"], &both[..], &["-o", "all.jsonl"]].concat());
    home.ends(0, &["report", "all.jsonl", "-o", "all.html"]);
    let page = fs::read_to_string(home.path("all.html")).unwrap();
    for said in [case, "synthetic:tiny", "ns/token"] {
        assert!(page.contains(said), "{said}");
    }
    home.ends(0, &["export", "--to", "github-action-benchmark", "all.jsonl", "-o", "times.json"]);
    home.ends(0, &["history", "add", "bench.jsonl", "--rev", "r1"]);
    // The line's first number is milliseconds, which a token of so small a model takes few of.
    let text = fs::read_to_string(home.path("scale.jsonl")).unwrap();
    let row = text.lines().find(|line| line.contains("\"kind\":\"scale\"")).unwrap();
    let row: Value = serde_json::from_str(row).unwrap();
    if let Some(a) = row["fit"]["a"].as_f64() {
        assert!(page.contains(&format!("{:.3}", 1e3 * a)), "{a}");
    }
}

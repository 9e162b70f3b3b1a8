//! The shape of src/: arrows go down, files are short, no type does everything. Read from the source text.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, top first. A module may import what lies in its own layer or below, and no two modules import each
/// other, not even by way of others. docs/design.md and src/lib.rs tell the same.
const LAYERS: &[(&str, &[&str])] = &[
    ("the door to C++", &["bridge", "tables"]),
    ("the process", &["allocator"]),
    ("a device", &["device"]),
    (
        "the parts of a device",
        &["accounting", "gpu", "heap", "placement", "budget", "pressure", "streams", "thread_cache", "tracer"],
    ),
    (
        "data",
        &[
            "blocks",
            "free_list",
            "history",
            "hooks",
            "options",
            "pages",
            "pools",
            "segments",
            "settings_string",
            "stats",
        ],
    ),
    ("names and sizes", &["column", "error", "ids", "place", "sizes", "sync"]),
    ("the port to CUDA", &["driver"]),
];

/// Who may name the trait by which CUDA is asked. The heap, the policies and the accounting cannot.
const ASK_CUDA: &[&str] = &["allocator", "bridge", "device/state", "driver", "gpu", "streams"];

/// Types that have more than one file: the others are parts of the first, and use it.
const ONE_TYPE: &[&str] = &["allocator", "heap"];

const LONGEST_FILE: usize = 500;
const MOST_METHODS: usize = 45;

/// A file of src/.
struct Source {
    /// As `heap/address_space`; all of a directory that is one module has the directory's name.
    module: String,
    /// As it is on the disk.
    file: String,
    /// Without comments and tests.
    code: String,
    lines: usize,
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("src/ is there") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    files(&root, &mut paths);
    paths.sort();
    paths
        .into_iter()
        .filter(|path| !path.ends_with("tests.rs"))
        .map(|path| {
            let text = fs::read_to_string(&path).expect("readable");
            let file = path.strip_prefix(&root).expect("in src/").to_string_lossy().into_owned();
            let name = file.trim_end_matches(".rs").trim_end_matches("/mod");
            // What is one module to everybody else.
            let whole = ["bridge", "driver"].into_iter().find(|whole| name.starts_with(&format!("{whole}/")));
            Source { module: whole.unwrap_or(name).to_owned(), lines: text.lines().count(), code: code(&text), file }
        })
        .collect()
}

/// The text without comments, string contents and tests.
fn code(text: &str) -> String {
    let mut kept = String::new();
    for line in text.lines().take_while(|line| *line != "mod tests {") {
        let line = line.trim_start();
        if !line.starts_with("//") {
            kept.push_str(line.split(" // ").next().unwrap_or(line));
            kept.push('\n');
        }
    }
    kept
}

/// The module, among `modules`, that a path of segments leads to.
fn resolve(segments: &[&str], modules: &BTreeSet<String>) -> Option<String> {
    (1..=segments.len()).rev().map(|length| segments[..length].join("/")).find(|name| modules.contains(name))
}

/// The paths that a use tree stands for: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths(tree: &str, before: &[String], found: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let mut path = before.to_vec();
        path.extend(tree.split("::").map(|part| part.split(" as ").next().unwrap_or(part).trim().to_owned()));
        found.push(path);
        return;
    };
    let mut path = before.to_vec();
    path.extend(tree[..open].split("::").map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned));
    let inner = &tree[open + 1..tree.rfind('}').expect("a closing brace")];
    let (mut depth, mut start) = (0, 0);
    for (index, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inner[start..index].trim().is_empty() {
                    paths(&inner[start..index], &path, found);
                }
                start = index + 1;
            }
            _ => {}
        }
    }
}

/// Which modules a file imports, `use` or not.
fn imports(source: &Source, modules: &BTreeSet<String>) -> BTreeSet<String> {
    let own: Vec<&str> = source.module.split('/').collect();
    let mut all = Vec::new();
    let mut rest = source.code.as_str();
    while let Some(at) = ["crate::", "super::"].iter().filter_map(|root| rest.find(root)).min() {
        let tail = &rest[at..];
        let (mut depth, mut end) = (0, tail.len());
        for (index, c) in tail.char_indices() {
            match c {
                '{' if tail[..index].ends_with("::") || depth > 0 => depth += 1,
                '}' if depth > 0 => {
                    depth -= 1;
                    if depth == 0 {
                        end = index + 1;
                        break;
                    }
                }
                c if depth == 0 && !(c.is_alphanumeric() || c == '_' || c == ':') => {
                    end = index;
                    break;
                }
                _ => {}
            }
        }
        paths(&tail[..end], &[], &mut all);
        rest = &tail[end.max(1)..];
    }
    // A parent that uses what it declares: `pub use child::Name`.
    for line in source.code.lines().filter(|line| line.starts_with("pub use ") || line.starts_with("use ")) {
        let tree = line.trim_start_matches("pub ").trim_start_matches("use ").trim_end_matches(';');
        let first = tree.split("::").next().unwrap_or(tree);
        if modules.contains(&format!("{}/{first}", source.module)) {
            all.push(vec!["crate".to_owned(), source.module.replace('/', "::"), first.to_owned()]);
        }
    }
    let mut found = BTreeSet::new();
    for path in &all {
        let mut segments: Vec<&str> = path.iter().flat_map(|part| part.split("::")).filter(|s| !s.is_empty()).collect();
        match segments[0] {
            "crate" => {
                segments.remove(0);
            }
            _ => {
                let ups = segments.iter().take_while(|segment| **segment == "super").count();
                segments.splice(..ups, own[..own.len().saturating_sub(ups)].iter().copied());
            }
        }
        found.extend(resolve(&segments, modules));
    }
    found.remove(&source.module);
    found
}

fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let sources = sources();
    let modules: BTreeSet<String> = sources.iter().map(|source| source.module.clone()).collect();
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources.iter().filter(|source| source.module != "lib") {
        graph.entry(source.module.clone()).or_default().extend(imports(source, &modules));
    }
    graph
}

#[test]
fn the_reader_of_imports_sees_them_all() {
    let graph = graph();
    let seen = |from: &str, to: &str| graph[from].contains(to);
    assert!(seen("device/grow", "device/reclaim") && seen("device/grow", "heap"), "{:?}", graph["device/grow"]);
    assert!(seen("device", "device/snapshot") && seen("allocator", "device/state"), "{:?}", graph["device"]);
    assert!(seen("blocks", "ids") && seen("heap/address_space", "heap") && seen("bridge", "allocator"));
    assert!(graph.len() > 35, "{} modules", graph.len());
}

#[test]
fn arrows_go_down() {
    let layer = |module: &str| {
        let top = module.split('/').next().unwrap_or(module);
        let found = LAYERS.iter().position(|(_, modules)| modules.contains(&top));
        found.unwrap_or_else(|| panic!("{module} is in no layer: put it into one"))
    };
    for (from, imported) in graph() {
        for to in imported {
            let (above, below) = (layer(&from), layer(&to));
            assert!(
                below >= above,
                "{from} ({}) imports {to} ({}), which lies above it",
                LAYERS[above].0,
                LAYERS[below].0
            );
        }
    }
}

#[test]
fn no_modules_import_each_other() {
    fn walk(at: &str, graph: &BTreeMap<String, BTreeSet<String>>, path: &mut Vec<String>, done: &mut BTreeSet<String>) {
        if let Some(start) = path.iter().position(|module| module == at) {
            panic!("a circle: {} -> {at}", path[start..].join(" -> "));
        }
        if done.contains(at) {
            return;
        }
        path.push(at.to_owned());
        for to in &graph[at] {
            if !(ONE_TYPE.contains(&to.as_str()) && at.starts_with(&format!("{to}/"))) {
                walk(to, graph, path, done);
            }
        }
        path.pop();
        done.insert(at.to_owned());
    }
    let graph = graph();
    let mut done = BTreeSet::new();
    for module in graph.keys() {
        walk(module, &graph, &mut Vec::new(), &mut done);
    }
}

#[test]
fn only_the_conversation_with_cuda_names_the_driver() {
    for source in sources() {
        let names = ["dyn Driver", "impl Driver", "Driver {"].iter().any(|name| source.code.contains(name));
        assert!(!names || ASK_CUDA.contains(&source.module.as_str()), "{} asks CUDA itself", source.file);
    }
}

#[test]
fn files_are_short() {
    for source in sources() {
        let Source { file, lines, .. } = source;
        assert!(lines <= LONGEST_FILE, "src/{file} has {lines} lines, {LONGEST_FILE} are allowed");
    }
}

#[test]
fn no_type_does_everything() {
    let mut methods: BTreeMap<String, usize> = BTreeMap::new();
    for source in sources() {
        let (mut depth, mut current) = (0_usize, None);
        for line in source.code.lines() {
            if depth == 0 && line.starts_with("impl") {
                let head = line.split(" where ").next().unwrap_or(line).trim_end_matches('{').trim();
                let name = head.rsplit(" for ").next().unwrap_or(head).rsplit(['>', ' ']).find(|part| !part.is_empty());
                let name = name.unwrap_or(head).split(['<', '\'']).next().unwrap_or(head);
                // What a trait asks for is the trait's size, not the type's.
                current = (!head.contains(" for ")).then(|| name.to_owned());
            }
            let is_function = ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "pub const fn ", "const fn "];
            if let (1, Some(name)) = (depth, &current)
                && is_function.iter().any(|start| line.starts_with(start))
            {
                *methods.entry(name.clone()).or_default() += 1;
            }
            depth = (depth + line.matches('{').count()).saturating_sub(line.matches('}').count());
            if depth == 0 && line.starts_with('}') {
                current = None;
            }
        }
    }
    let state = methods.get("DeviceState").copied().unwrap_or(0);
    assert!(state > 10, "the counter sees methods: {methods:?}");
    for (name, count) in methods {
        assert!(count <= MOST_METHODS, "{name} has {count} methods, {MOST_METHODS} are allowed");
    }
}

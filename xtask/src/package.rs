//! What the plug-in's wheel says of the package: `pyproject.toml`, the version of `Cargo.toml`, and README.md.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use toml_edit::{DocumentMut, Item, TableLike};

use crate::paths::{self, shown};

/// The package's metadata.
pub struct Package {
    /// METADATA, in the core metadata format.
    pub metadata: String,
    /// entry_points.txt
    pub entry_points: String,
}

/// The version of everything here: the workspace's.
pub fn version() -> Result<String> {
    let manifest = document(&paths::root().join("Cargo.toml"))?;
    let version = manifest.get("workspace").and_then(|item| item.get("package")).and_then(|item| item.get("version"));
    let version = version.and_then(Item::as_str).context("Cargo.toml: workspace.package.version is missing")?;
    Ok(version.to_owned())
}

/// What the wheel says, for a package that needs `torch` (`>=2.6,<2.16`).
pub fn describe(torch: &str) -> Result<Package> {
    let file = paths::root().join("pyproject.toml");
    let text = read(&file)?;
    let readme = |name: &str| read(&paths::root().join(name));
    described(&text, &version()?, torch, readme).with_context(|| format!("cannot use {}", shown(&file)))
}

/// A TOML file.
pub fn document(file: &Path) -> Result<DocumentMut> {
    read(file)?.parse().with_context(|| format!("{} is not TOML", shown(file)))
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", shown(file)))
}

fn described(text: &str, version: &str, torch: &str, readme: impl Fn(&str) -> Result<String>) -> Result<Package> {
    let document: DocumentMut = text.parse()?;
    let project = document.get("project").and_then(Item::as_table_like).context("there is no table project")?;
    let known = [
        "name",
        "dynamic",
        "description",
        "readme",
        "license",
        "license-files",
        "authors",
        "requires-python",
        "keywords",
        "classifiers",
        "urls",
        "optional-dependencies",
        "entry-points",
    ];
    // What is not known here would be missing in the wheel without a word.
    if let Some((key, _)) = project.iter().find(|(key, _)| !known.contains(key)) {
        bail!("project.{key}: expected {}", known.join(", "));
    }
    let mut metadata = format!("Metadata-Version: 2.4\nName: {}\nVersion: {version}\n", string(project, "name")?);
    let mut line = |key: &str, value: &str| -> Result<()> {
        ensure!(!value.contains('\n'), "{key}: a line break is not allowed");
        writeln!(metadata, "{key}: {value}")?;
        Ok(())
    };
    line("Summary", string(project, "description")?)?;
    for author in array(project, "authors")? {
        let name = author.as_inline_table().and_then(|author| author.get("name")).and_then(|name| name.as_str());
        line("Author", name.context("authors: expected tables with a name")?)?;
    }
    line("License-Expression", string(project, "license")?)?;
    for file in strings(project, "license-files")? {
        line("License-File", file)?;
    }
    line("Keywords", &strings(project, "keywords")?.join(","))?;
    for classifier in strings(project, "classifiers")? {
        line("Classifier", classifier)?;
    }
    for (name, url) in table(project, "urls")? {
        line("Project-URL", &format!("{name}, {}", url.as_str().context("urls: expected strings")?))?;
    }
    line("Requires-Python", string(project, "requires-python")?)?;
    line("Requires-Dist", &format!("torch{torch}"))?;
    for (extra, needs) in table(project, "optional-dependencies")? {
        line("Provides-Extra", extra)?;
        for need in needs.as_array().into_iter().flatten() {
            let need = need.as_str().context("optional-dependencies: expected strings")?;
            line("Requires-Dist", &format!("{need}; extra == \"{extra}\""))?;
        }
    }
    line("Description-Content-Type", "text/markdown")?;
    write!(metadata, "\n{}", readme(string(project, "readme")?)?)?;

    let mut entry_points = String::new();
    for (group, names) in table(project, "entry-points")? {
        writeln!(entry_points, "[{group}]")?;
        for (name, object) in names.as_table_like().context("entry-points: expected tables")?.iter() {
            writeln!(entry_points, "{name} = {}", object.as_str().context("entry-points: expected strings")?)?;
        }
    }
    Ok(Package { metadata, entry_points })
}

fn string<'a>(table: &'a dyn TableLike, key: &str) -> Result<&'a str> {
    table.get(key).and_then(Item::as_str).with_context(|| format!("project.{key}: expected a string"))
}

fn array<'a>(table: &'a dyn TableLike, key: &str) -> Result<&'a toml_edit::Array> {
    table.get(key).and_then(Item::as_array).with_context(|| format!("project.{key}: expected a list"))
}

fn strings<'a>(table: &'a dyn TableLike, key: &str) -> Result<Vec<&'a str>> {
    let strings = array(table, key)?.iter().map(|value| value.as_str());
    strings.collect::<Option<_>>().with_context(|| format!("project.{key}: expected a list of strings"))
}

/// The table's entries; none where there is no such table.
fn table<'a>(table: &'a dyn TableLike, key: &str) -> Result<Vec<(&'a str, &'a Item)>> {
    match table.get(key) {
        None => Ok(Vec::new()),
        Some(item) => {
            Ok(item.as_table_like().with_context(|| format!("project.{key}: expected a table"))?.iter().collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheel_says_what_the_project_says() {
        let package = describe(">=2.6,<2.16").unwrap();
        let (head, body) = package.metadata.split_once("\n\n").unwrap();
        let version = version().unwrap();
        for line in [
            "Metadata-Version: 2.4",
            "Name: torch-uvm",
            &format!("Version: {version}"),
            "Author: torch-uvm maintainers",
            "License-Expression: Apache-2.0",
            "License-File: LICENSE",
            "Requires-Python: >=3.9",
            "Requires-Dist: torch>=2.6,<2.16",
            "Requires-Dist: plotly>=5.18; extra == \"report\"",
            "Description-Content-Type: text/markdown",
        ] {
            assert!(head.lines().any(|there| there == line), "{line}: {head}");
        }
        assert_eq!(body, fs::read_to_string(paths::root().join("README.md")).unwrap());
        assert_eq!(package.entry_points, "[torch.backends]\ntorch_uvm = torch_uvm._activate:autoload\n");
    }

    #[test]
    fn what_would_be_lost_is_an_error() {
        let text = fs::read_to_string(paths::root().join("pyproject.toml")).unwrap();
        let described = |text: &str| described(text, "1.0.0", ">=2", |_| Ok("# It\n".into()));
        let changed = |from: &str, to: &str| {
            assert!(text.contains(from));
            described(&text.replace(from, to)).map(|_| ()).unwrap_err().to_string()
        };
        assert!(changed("keywords =", "maintainers =").contains("project.maintainers"));
        assert!(changed("license = \"Apache-2.0\"", "license = 2").contains("project.license"));
        let urls = text.replace("[project.optional", "[project.urls]\nSource = \"ssh://there\"\n\n[project.optional");
        assert!(described(&urls).unwrap().metadata.contains("\nProject-URL: Source, ssh://there\n"));
    }
}

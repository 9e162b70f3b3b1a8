//! The package index, asked directly: pip fetches whole files only, and of most we want a few MB out of hundreds.
//!
//! Which index, which certificates and which proxy is what pip would take, from its variables and its configuration.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use ureq::Agent;
use ureq::tls::{PemItem, RootCerts, TlsConfig};

use crate::process;
use crate::python::Venv;

const USUAL: &str = "https://pypi.org/simple";
/// Certificates of authorities: the variables that pip and its libraries look at, in their order.
const CERTIFICATE_VARIABLES: [&str; 4] = ["PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"];
/// Where Debian and Red Hat keep the machine's own.
const CERTIFICATE_FILES: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];
const PATIENCE: Duration = Duration::from_secs(120);
const ATTEMPTS: u32 = 4;
/// How much is fetched at a time.
const BLOCK: u64 = 1 << 20;

/// A package index in the form of PEP 503.
pub struct Index {
    agent: Agent,
    /// With a slash at its end.
    url: String,
}

impl Index {
    /// The index that pip in `venv` would ask.
    pub fn of_pip(venv: &Venv) -> Result<Self> {
        let url = format!("{}/", url(venv).trim_end_matches('/'));
        ensure!(url.contains("://"), "pip's index «{url}» is not a URL");
        let tls = TlsConfig::builder().root_certs(root_certificates()?).build();
        let agent = Agent::config_builder().tls_config(tls).timeout_global(Some(PATIENCE)).build().new_agent();
        Ok(Self { agent, url })
    }

    /// The first file of `package` whose name `wanted` accepts, opened for reading.
    pub fn open(&self, package: &str, wanted: impl Fn(&str) -> bool) -> Result<RemoteFile> {
        let page = format!("{}{package}/", self.url);
        let shown = public(&page);
        let text = self.page(&page).with_context(|| format!("cannot read {shown}"))?;
        let link = links(&text).find(|link| wanted(file_name(link)));
        let link = link.with_context(|| format!("{shown} does not list the file"))?;
        RemoteFile::open(self.agent.clone(), joined(&page, &link))
    }

    /// The newest release of `package` that has wheels; pre-releases do not count.
    pub fn newest(&self, package: &str) -> Result<Option<String>> {
        let page = format!("{}{package}/", self.url);
        let text = self.page(&page).with_context(|| format!("cannot read {}", public(&page)))?;
        Ok(newest(links(&text).map(|link| file_name(&link).to_owned())))
    }

    fn page(&self, page: &str) -> Result<String> {
        retried(|| {
            let request = self.agent.get(page).header("Accept", "application/vnd.pypi.simple.v1+html, text/html");
            Ok(request.call()?.body_mut().with_config().limit(64 << 20).read_to_string()?)
        })
    }
}

/// The URL of the index that pip in `venv` would ask.
pub fn url(venv: &Venv) -> String {
    let variable = env::var("PIP_INDEX_URL").ok().filter(|url| !url.is_empty());
    // pip ends with an error where the key is not set.
    let configured = || process::capture(&mut venv.pip(["config", "get", "global.index-url"])).ok();
    variable.or_else(configured).unwrap_or_else(|| USUAL.to_owned()).trim().to_owned()
}

/// The file with the certificates of authorities that this machine trusts; None where only the programs' own are known.
pub fn certificates() -> Option<PathBuf> {
    let named = CERTIFICATE_VARIABLES.iter().find_map(|name| env::var_os(name).filter(|file| !file.is_empty()));
    let usual = || CERTIFICATE_FILES.iter().map(PathBuf::from).find(|file| file.exists());
    named.map(PathBuf::from).or_else(usual)
}

fn root_certificates() -> Result<RootCerts> {
    // Else the authorities that Mozilla trusts, which the TLS library brings along.
    let Some(file) = certificates() else { return Ok(RootCerts::WebPki) };
    let text = fs::read(&file).with_context(|| format!("cannot read the certificates in {}", file.display()))?;
    let certificates = ureq::tls::parse_pem(&text).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    });
    let certificates: Vec<_> =
        certificates.collect::<Result<_, _>>().with_context(|| format!("{} is not in PEM form", file.display()))?;
    ensure!(!certificates.is_empty(), "there is no certificate in {}", file.display());
    Ok(certificates.into())
}

/// Tries again after errors that may pass: the network's and the server's own.
fn retried<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let mut pause = Duration::from_secs(1);
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(error) if may_pass(&error) => thread::sleep(pause),
            ended => return ended,
        }
        pause *= 3;
    }
    attempt()
}

fn may_pass(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ureq::Error>() {
        Some(ureq::Error::StatusCode(status)) => *status == 429 || *status >= 500,
        Some(ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed) => true,
        _ => false,
    }
}

/// The targets of a page's links.
fn links(page: &str) -> impl Iterator<Item = String> {
    page.split("href=").skip(1).filter_map(|rest| {
        let quote = rest.chars().next().filter(|quote| "\"'".contains(*quote))?;
        Some(rest[1..].split(quote).next()?.replace("&amp;", "&"))
    })
}

/// The newest version among the names of wheels, of those that are numbers alone.
fn newest(files: impl Iterator<Item = String>) -> Option<String> {
    let version = |file: String| file.strip_suffix(".whl")?.split('-').nth(1).map(str::to_owned);
    let numbers =
        |version: &String| version.split('.').map(|part| part.parse::<u32>().ok()).collect::<Option<Vec<_>>>();
    files
        .filter_map(version)
        .filter_map(|version| Some((numbers(&version)?, version)))
        .max()
        .map(|(_, version)| version)
}

/// The name of the file that a link leads to.
fn file_name(link: &str) -> &str {
    let path = link.split(['#', '?']).next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default()
}

/// Where a link of a page leads to.
fn joined(page: &str, link: &str) -> String {
    let link = link.split('#').next().unwrap_or_default();
    let scheme = page.find("://").map_or(0, |at| at + 1);
    let host = page[scheme..].trim_start_matches('/').find('/').map_or(page.len(), |at| at + scheme + 2);
    if link.contains("://") {
        return link.to_owned();
    }
    if link.starts_with("//") {
        return format!("{}{link}", &page[..scheme]);
    }
    let mut folders: Vec<_> = page[host..].split('/').collect();
    folders.pop();
    let mut link = link;
    if link.starts_with('/') {
        folders.clear();
    }
    while let Some(rest) = link.strip_prefix("../") {
        link = rest;
        if folders.len() > 1 {
            folders.pop();
        }
    }
    format!("{}{}/{}", &page[..host], folders.join("/"), link.trim_start_matches("./").trim_start_matches('/'))
}

/// A URL without what may be secret: a password before the host, a key behind the path.
fn public(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}/{path}")
}

/// A file on a web server, of which only the parts that are read are fetched, each once.
#[derive(Debug)]
pub struct RemoteFile {
    agent: Agent,
    url: String,
    length: u64,
    position: u64,
    blocks: HashMap<u64, Vec<u8>>,
}

impl RemoteFile {
    fn open(agent: Agent, url: String) -> Result<Self> {
        let mut file = Self { agent, url, length: 0, position: 0, blocks: HashMap::new() };
        // The end of a file says how long it is, and a zip archive is read from there.
        let (length, bytes) = file.fetch(&format!("bytes=-{BLOCK}"))?;
        file.length = length;
        let begin = length - bytes.len() as u64;
        let whole = begin.div_ceil(BLOCK);
        if whole * BLOCK < length {
            file.blocks.insert(whole, bytes[(whole * BLOCK - begin) as usize..].to_vec());
        }
        Ok(file)
    }

    /// Where it is, for messages.
    pub fn name(&self) -> String {
        public(&self.url)
    }

    /// How many bytes were fetched.
    pub fn fetched(&self) -> u64 {
        self.blocks.values().map(|block| block.len() as u64).sum()
    }

    /// A range of bytes (as in the header `Range`), and how long the file is.
    fn fetch(&self, range: &str) -> Result<(u64, Vec<u8>)> {
        let fetch = || {
            let mut response = self.agent.get(&self.url).header("Range", range).call()?;
            ensure!(response.status() == 206, "the server gives whole files only (status {})", response.status());
            let total = response.headers().get("Content-Range").and_then(|value| value.to_str().ok());
            let total = total.and_then(|value| value.rsplit_once('/')?.1.parse().ok());
            let total = total.context("the server does not say how long the file is")?;
            Ok((total, response.body_mut().with_config().limit(2 * BLOCK).read_to_vec()?))
        };
        retried(fetch).with_context(|| format!("cannot fetch a part of {}", self.name()))
    }

    fn block(&mut self, number: u64) -> Result<&[u8]> {
        if !self.blocks.contains_key(&number) {
            let begin = number * BLOCK;
            let end = (begin + BLOCK).min(self.length);
            let (_, bytes) = self.fetch(&format!("bytes={begin}-{}", end - 1))?;
            if bytes.len() as u64 != end - begin {
                bail!("{} bytes of {} came where {} were asked for", bytes.len(), self.name(), end - begin);
            }
            self.blocks.insert(number, bytes);
        }
        self.blocks.get(&number).map(Vec::as_slice).ok_or_else(|| anyhow!("block {number} is lost"))
    }
}

impl Read for RemoteFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.length || buffer.is_empty() {
            return Ok(0);
        }
        let (number, offset) = (self.position / BLOCK, (self.position % BLOCK) as usize);
        let block = self.block(number).map_err(|error| io::Error::other(format!("{error:#}")))?;
        let count = buffer.len().min(block.len() - offset);
        buffer[..count].copy_from_slice(&block[offset..offset + count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for RemoteFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Serves `bytes`: parts of them where `ranges`. The first answer is an error of the server's, to be tried again.
    fn serve(bytes: Vec<u8>, ranges: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/a/file.whl?key=secret", listener.local_addr().unwrap());
        thread::spawn(move || {
            for (number, connection) in listener.incoming().enumerate() {
                answer(connection.unwrap(), &bytes, ranges, number == 0);
            }
        });
        url
    }

    fn answer(connection: TcpStream, bytes: &[u8], ranges: bool, fail: bool) {
        let mut range = None;
        for line in BufReader::new(&connection).lines() {
            let line = line.unwrap().to_lowercase();
            if let Some(value) = line.strip_prefix("range: bytes=") {
                let (begin, end) = value.split_once('-').unwrap();
                let length = bytes.len();
                range = Some(match (begin.parse::<usize>(), end.parse::<usize>()) {
                    (Ok(begin), Ok(end)) => begin..(end + 1).min(length),
                    (Ok(begin), Err(_)) => begin..length,
                    (Err(_), last) => length - last.unwrap().min(length)..length,
                });
            }
            if line.is_empty() {
                break;
            }
        }
        let (status, body, more) = match range {
            _ if fail => ("503 Busy", &b""[..], String::new()),
            Some(range) if ranges => {
                let header = format!("Content-Range: bytes {}-{}/{}\r\n", range.start, range.end - 1, bytes.len());
                ("206 Partial Content", &bytes[range], header)
            }
            _ => ("200 OK", bytes, String::new()),
        };
        let head = format!("HTTP/1.1 {status}\r\n{more}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        (&connection).write_all(&[head.as_bytes(), body].concat()).unwrap();
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n * 7 + n / 251) as u8).collect()
    }

    #[test]
    fn parts_are_fetched_once() {
        let all = bytes(5 * BLOCK as usize + 1234);
        let mut file = RemoteFile::open(Agent::new_with_defaults(), serve(all.clone(), true)).unwrap();
        assert_eq!(file.length, all.len() as u64);
        let mut read = |at: usize, count: usize| {
            file.seek(SeekFrom::Start(at as u64)).unwrap();
            let mut buffer = vec![0; count];
            file.read_exact(&mut buffer).unwrap();
            assert_eq!(buffer, all[at..at + count]);
            file.fetched()
        };
        let last = all.len() as u64 - 5 * BLOCK;
        assert_eq!(read(all.len() - 100, 100), last);
        assert_eq!(read(BLOCK as usize - 10, 20), last + 2 * BLOCK);
        assert_eq!(read(5, BLOCK as usize), last + 2 * BLOCK);
        file.seek(SeekFrom::End(0)).unwrap();
        assert_eq!(file.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn small_files_come_at_once() {
        let all = bytes(1000);
        let mut file = RemoteFile::open(Agent::new_with_defaults(), serve(all.clone(), true)).unwrap();
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!((read, file.fetched()), (all, 1000));
    }

    #[test]
    fn servers_without_ranges_are_refused_by_name() {
        let error = RemoteFile::open(Agent::new_with_defaults(), serve(bytes(10), false)).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("whole files only") && error.contains("/a/file.whl"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn links_are_found_in_any_page() {
        let page = "<a href=\"../../p/a/torch-1.whl#sha256=1\">torch-1.whl</a>\n<a class=x href='https://h/t-2.whl?a=1&amp;b=2'>";
        let found: Vec<_> = links(page).collect();
        assert_eq!(found, ["../../p/a/torch-1.whl#sha256=1", "https://h/t-2.whl?a=1&b=2"]);
        assert_eq!(found.iter().map(|link| file_name(link)).collect::<Vec<_>>(), ["torch-1.whl", "t-2.whl"]);
    }

    #[test]
    fn newest_release_is_the_highest_number() {
        let files =
            ["torch-2.9.1-cp311-x.whl", "torch-2.15.0-cp311-x.whl", "torch-2.16.0rc1-cp311-x.whl", "torch-3.0.tar.gz"];
        assert_eq!(newest(files.iter().map(|file| file.to_string())).as_deref(), Some("2.15.0"));
        assert_eq!(newest(std::iter::empty()), None);
    }

    #[test]
    fn links_lead_from_their_page() {
        let page = "https://user:word@host/a/simple/torch/";
        for (link, expected) in [
            ("https://files/p/t.whl#sha256=1", "https://files/p/t.whl"),
            ("//files/t.whl", "https://files/t.whl"),
            ("/p/t.whl?k=1", "https://user:word@host/p/t.whl?k=1"),
            ("t.whl", "https://user:word@host/a/simple/torch/t.whl"),
            ("./t.whl", "https://user:word@host/a/simple/torch/t.whl"),
            ("../../p/t.whl", "https://user:word@host/a/p/t.whl"),
            ("../../../../../p/t.whl", "https://user:word@host/p/t.whl"),
        ] {
            assert_eq!(joined(page, link), expected, "{link}");
        }
        assert_eq!(public(page), "https://host/a/simple/torch/");
        assert_eq!(public("http://h/p?key=secret"), "http://h/p");
    }
}

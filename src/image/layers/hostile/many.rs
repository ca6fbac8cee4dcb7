//! More of everything than an honest layer has.

use super::*;

#[test]
fn a_million_entries_fit_and_go_again_at_once() {
    // A hundred thousand without optimisation, which shows the same: each entry takes the same time and memory.
    let total: u32 = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
    let name = |number: u32| format!("d{}/f{number}", number % 7).into_bytes();
    let mut number = 0;
    let stream = std::iter::from_fn(|| {
        number += 1;
        (number <= total).then(|| header(&name(number), b'0', b"", 0))
    });
    struct Stream<I>(I, Vec<u8>);
    impl<I: Iterator<Item = Vec<u8>>> Read for Stream<I> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.1.is_empty() {
                self.1 = self.0.next().unwrap_or_default();
            }
            let length = self.1.len().min(buffer.len());
            buffer[..length].copy_from_slice(&self.1[..length]);
            self.1.drain(..length);
            Ok(length)
        }
    }
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    let before = resident();
    let (mut converter, image) = converter(Limits::default());
    let began = std::time::Instant::now();
    converter.apply(Stream(stream, Vec::new())).unwrap();
    let grown = resident().saturating_sub(before);
    assert!(grown < u64::from(total) * 600 + (64 << 20), "{grown} bytes for {total} entries");
    // Each of these goes over nothing twice, however often it is said.
    let whiteouts: Vec<u8> = (0..10_000).flat_map(|n| file(&format!("d{}/.wh..wh..opq", n % 5), "")).collect();
    converter.apply(Cursor::new(whiteouts)).unwrap();
    let tree = converter.finish().unwrap();
    let names = |number| tree.list(format!("d{number}").as_bytes()).unwrap().len();
    let left: Vec<usize> = (0..7).map(names).collect();
    let expected = |rest| (1..=total).filter(|number| number % 7 == rest).count();
    assert_eq!(left, [0, 0, 0, 0, 0, expected(5), expected(6)]);
    assert!(began.elapsed() < std::time::Duration::from_secs(120), "{:?}", began.elapsed());
    sound(&image);
}

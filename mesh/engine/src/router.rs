//! Allowed-IPs: a persistent path-compressed binary trie. A changed copy shares every untouched
//! node with the snapshot it came from, so one change costs O(depth) and readers never wait.

use std::net::IpAddr;
use std::sync::Arc;

/// An address prefix; host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    v6: bool,
    len: u8,
    /// Address bits, left aligned.
    bits: u128,
}

fn align(ip: IpAddr) -> (bool, u128) {
    match ip {
        IpAddr::V4(a) => (false, u128::from(u32::from(a)) << 96),
        IpAddr::V6(a) => (true, u128::from(a)),
    }
}

fn mask(len: u8) -> u128 {
    if len == 0 {
        0
    } else {
        u128::MAX << (128 - u32::from(len))
    }
}

impl Prefix {
    /// `None` when `len` is too long for the family. Host bits are cleared.
    pub fn new(ip: IpAddr, len: u8) -> Option<Self> {
        let (v6, bits) = align(ip);
        let max = if v6 { 128 } else { 32 };
        (len <= max).then(|| Self { v6, len, bits: bits & mask(len) })
    }

    pub fn addr(&self) -> IpAddr {
        if self.v6 {
            IpAddr::V6(self.bits.into())
        } else {
            IpAddr::V4(((self.bits >> 96) as u32).into())
        }
    }

    pub fn len(&self) -> u8 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        false
    }
}

#[derive(Clone)]
struct Node<V> {
    bits: u128,
    len: u8,
    value: Option<V>,
    child: [Link<V>; 2],
}

type Link<V> = Option<Arc<Node<V>>>;

impl<V> Node<V> {
    fn leaf(bits: u128, len: u8, value: V) -> Arc<Self> {
        Arc::new(Node { bits, len, value: Some(value), child: [None, None] })
    }
}

fn bit(bits: u128, at: u8) -> usize {
    (bits >> (127 - u32::from(at))) as usize & 1
}

fn insert<V: Clone>(link: &mut Link<V>, bits: u128, len: u8, value: V) -> Option<V> {
    let Some(arc) = link else {
        *link = Some(Node::leaf(bits, len, value));
        return None;
    };
    let common = ((arc.bits ^ bits).leading_zeros() as u8).min(arc.len).min(len);
    if common < arc.len {
        // The new prefix leaves this node's path: put a node above it.
        let old = arc.clone();
        let side = bit(old.bits, common);
        let mut top = Node { bits: bits & mask(common), len: common, value: None, child: [None, None] };
        top.child[side] = Some(old);
        if common == len {
            top.value = Some(value);
        } else {
            top.child[1 - side] = Some(Node::leaf(bits, len, value));
        }
        *link = Some(Arc::new(top));
        return None;
    }
    let node = Arc::make_mut(arc);
    if len == node.len {
        return node.value.replace(value);
    }
    insert(&mut node.child[bit(bits, node.len)], bits, len, value)
}

fn remove<V: Clone>(link: &mut Link<V>, bits: u128, len: u8) -> Option<V> {
    let arc = link.as_mut()?;
    if arc.len > len || (arc.bits ^ bits) & mask(arc.len) != 0 {
        return None;
    }
    let at = arc.len;
    let node = Arc::make_mut(arc);
    let out = if at == len { node.value.take() } else { remove(&mut node.child[bit(bits, at)], bits, len) };
    if node.value.is_none() {
        match (node.child[0].take(), node.child[1].take()) {
            (None, None) => *link = None,
            (Some(only), None) | (None, Some(only)) => *link = Some(only),
            (a, b) => node.child = [a, b],
        }
    }
    out
}

/// Longest-prefix-match table for both families. Cloning is O(1) and shares all nodes.
pub struct Table<V> {
    root: [Link<V>; 2],
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self { root: [None, None] }
    }
}

impl<V> Clone for Table<V> {
    fn clone(&self) -> Self {
        Self { root: self.root.clone() }
    }
}

impl<V: Clone> Table<V> {
    /// Inserts or replaces; returns the previous owner of exactly this prefix.
    pub fn insert(&mut self, p: Prefix, value: V) -> Option<V> {
        insert(&mut self.root[usize::from(p.v6)], p.bits, p.len, value)
    }

    pub fn remove(&mut self, p: Prefix) -> Option<V> {
        remove(&mut self.root[usize::from(p.v6)], p.bits, p.len)
    }

    /// The value of the longest prefix that covers `ip`.
    pub fn lookup(&self, ip: IpAddr) -> Option<&V> {
        let (v6, bits) = align(ip);
        let mut link = &self.root[usize::from(v6)];
        let mut best = None;
        while let Some(node) = link {
            if (node.bits ^ bits) & mask(node.len) != 0 {
                break;
            }
            if node.value.is_some() {
                best = node.value.as_ref();
            }
            if node.len == 128 {
                break;
            }
            link = &node.child[bit(bits, node.len)];
        }
        best
    }
}

#[cfg(test)]
impl<V> Table<V> {
    /// Walks what differs from `old`: (subtrees shared with it, nodes made afresh).
    pub fn sharing(&self, old: &Self) -> (usize, usize) {
        fn walk<V>(a: &Link<V>, b: &Link<V>, n: &mut (usize, usize)) {
            match (a, b) {
                (Some(x), Some(y)) if Arc::ptr_eq(x, y) => n.0 += 1,
                (Some(x), other) => {
                    n.1 += 1;
                    for i in 0..2 {
                        walk(&x.child[i], other.as_ref().map_or(&None, |y| &y.child[i]), n);
                    }
                }
                _ => {}
            }
        }
        let mut n = (0, 0);
        for i in 0..2 {
            walk(&self.root[i], &old.root[i], &mut n);
        }
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn p(s: &str) -> Prefix {
        let (a, l) = s.split_once('/').unwrap();
        Prefix::new(a.parse().unwrap(), l.parse().unwrap()).unwrap()
    }

    fn ip(s: &str) -> IpAddr {
        s.parse().unwrap()
    }

    #[test]
    fn longest_match_wins_and_families_are_apart() {
        let mut t = Table::default();
        for (s, v) in
            [("0.0.0.0/0", 0), ("10.0.0.0/8", 1), ("10.1.0.0/16", 2), ("10.1.2.3/32", 3), ("::/0", 4)]
        {
            assert_eq!(t.insert(p(s), v), None);
        }
        assert_eq!(t.lookup(ip("10.1.2.3")), Some(&3));
        assert_eq!(t.lookup(ip("10.1.2.4")), Some(&2));
        assert_eq!(t.lookup(ip("10.2.2.4")), Some(&1));
        assert_eq!(t.lookup(ip("192.0.2.1")), Some(&0));
        assert_eq!(t.lookup(ip("2001:db8::1")), Some(&4));
        assert_eq!(t.remove(p("10.1.0.0/16")), Some(2));
        assert_eq!(t.remove(p("10.1.0.0/16")), None);
        assert_eq!(t.lookup(ip("10.1.2.4")), Some(&1));
        assert_eq!(t.lookup(ip("10.1.2.3")), Some(&3));
        assert_eq!(t.insert(p("10.1.2.3/32"), 9), Some(3));
    }

    #[test]
    fn a_snapshot_is_not_changed_by_its_copy() {
        let mut a = Table::default();
        a.insert(p("10.0.0.0/8"), 1);
        let b = a.clone();
        a.insert(p("10.0.0.0/9"), 2);
        a.remove(p("10.0.0.0/8"));
        assert_eq!(b.lookup(ip("10.0.0.1")), Some(&1));
        assert_eq!(a.lookup(ip("10.0.0.1")), Some(&2));
        assert_eq!(a.lookup(ip("10.200.0.1")), None);
    }

    #[test]
    fn differential_against_a_linear_scan() {
        let mut seed = 42u64;
        let mut rnd = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            seed >> 31
        };
        for v6 in [false, true] {
            let mut t = Table::default();
            let mut model: BTreeMap<Prefix, u64> = BTreeMap::new();
            let random_ip = |r: u64| -> IpAddr {
                if v6 {
                    IpAddr::V6(
                        (0x2001_0db8_u128 << 96 | u128::from(r & 0xff) << 56 | u128::from(r >> 9 & 15))
                            .into(),
                    )
                } else {
                    IpAddr::V4((0x0a00_0000 | (r & 0xf0f0f) as u32).into())
                }
            };
            for step in 0..6000u64 {
                let max = if v6 { 129 } else { 33 };
                let pre = Prefix::new(random_ip(rnd()), (rnd() % max) as u8).unwrap();
                if rnd() % 3 == 0 {
                    assert_eq!(t.remove(pre), model.remove(&pre));
                } else {
                    assert_eq!(t.insert(pre, step), model.insert(pre, step));
                }
                let q = random_ip(rnd());
                let want = model
                    .iter()
                    .filter(|(k, _)| Prefix::new(q, k.len()).unwrap() == **k)
                    .max_by_key(|(k, _)| k.len())
                    .map(|(_, v)| v);
                assert_eq!(t.lookup(q), want, "step {step} {q}");
            }
            for pre in model.keys().copied().collect::<Vec<_>>() {
                assert!(t.remove(pre).is_some());
            }
            assert!(t.root.iter().all(Option::is_none), "no empty node stays");
        }
    }

    #[test]
    fn bad_lengths() {
        assert!(Prefix::new(ip("1.2.3.4"), 33).is_none());
        assert!(Prefix::new(ip("::1"), 129).is_none());
        assert_eq!(p("10.1.2.3/8"), p("10.0.0.0/8"));
    }
}

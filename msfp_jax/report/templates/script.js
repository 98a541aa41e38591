'use strict';

// Before and after: the left image is cut where the slider stands.
for (const compare of document.querySelectorAll('.compare')) {
  const stack = compare.querySelector('.stack');
  const slider = compare.querySelector('input');
  const selects = compare.querySelectorAll('select');
  const methods = new Map([...document.querySelectorAll('img[data-method]')]
      .map((image) => [image.dataset.method, image]));

  const show = () => {
    for (const select of selects) {
      const image = stack.querySelector(
          `img[data-side="${select.dataset.side}"]`);
      const method = methods.get(select.value);
      image.src = method.src;
      image.alt = method.alt;
    }
  };
  const cut = () => {
    stack.style.setProperty('--cut', `${slider.value}%`);
    slider.setAttribute('aria-valuetext',
        `${slider.value}% ${selects[0].value}, ` +
        `${100 - slider.value}% ${selects[1].value}`);
  };
  for (const select of selects) {
    select.addEventListener('change', () => { show(); cut(); });
  }
  slider.addEventListener('input', cut);
  stack.addEventListener('pointerdown', (down) => {
    const follow = (event) => {
      const box = stack.getBoundingClientRect();
      slider.value = 100 * (event.clientX - box.left) / box.width;
      cut();
    };
    const release = () => {
      stack.removeEventListener('pointermove', follow);
      removeEventListener('pointerup', release);
    };
    down.preventDefault();
    follow(down);
    stack.addEventListener('pointermove', follow);
    addEventListener('pointerup', release);
  });
  show();
  cut();
  compare.hidden = false;
}

// Tables: a click on a heading sorts, a second one turns the order round.
// Rows without a value stay at the end.
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];

  const sort = (column, direction) => {
    const value = (row) => row.cells[column].dataset.value;
    const numeric = [...body.rows].every(
        (row) => value(row) === '' || !Number.isNaN(Number(value(row))));
    const compare = (a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === '' || right === '') return (left === '') - (right === '');
      return direction * (numeric ? left - right
          : left.localeCompare(right, 'en', {numeric: true}));
    };
    body.append(...[...body.rows].sort(compare));
  };

  headings.forEach((heading, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener('click', () => {
      const descending = heading.ariaSort === 'ascending';
      for (const other of headings) other.removeAttribute('aria-sort');
      heading.ariaSort = descending ? 'descending' : 'ascending';
      sort(column, descending ? -1 : 1);
    });
  });

  const filter = document.getElementById(table.dataset.filter);
  const select = filter.querySelector('select');
  const status = filter.querySelector('[role="status"]');
  const apply = () => {
    let shown = 0;
    for (const row of body.rows) {
      const cell = row.cells[table.dataset.filterColumn];
      row.hidden = select.value !== '' && cell.dataset.value !== select.value;
      shown += !row.hidden;
    }
    status.textContent = `${shown} of ${body.rows.length} ${table.dataset.unit}`;
  };
  select.addEventListener('change', apply);
  apply();
  filter.hidden = false;
}

// The navigation marks the section that is read.
const links = new Map([...document.querySelectorAll('nav a')]
    .map((link) => [link.getAttribute('href').slice(1), link]));
const mark = () => {
  const sections = [...document.querySelectorAll('main > section')];
  const atEnd = innerHeight + scrollY >= document.body.scrollHeight - 2;
  const current = atEnd ? sections.at(-1) : sections.findLast(
      (section) => section.getBoundingClientRect().top < 120) ?? sections[0];
  for (const [id, link] of links) {
    if (id !== current.id) {
      link.removeAttribute('aria-current');
    } else if (!link.hasAttribute('aria-current')) {
      link.setAttribute('aria-current', 'true');
      const list = link.closest('ul');
      list.scrollLeft = link.offsetLeft - list.clientWidth / 3;
    }
  }
};
addEventListener('scroll', mark, {passive: true});
mark();
